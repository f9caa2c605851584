// lsh_decode and lsh_cache_append on the CPU: one query, and one head's table, after the other.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "chunked_attention_common.h"
#include "lanes.h"
#include "lsh_decode_common.h"

namespace reformer {
namespace {

// Elements read: waking a thread for less takes longer than the work.
constexpr int64_t kWorthAThread = 1 << 16;

template <typename S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The positions before `end` in the query's bucket of every round, each once if asked for.
void find_candidates(const int32_t* table, const int32_t* counts, const int32_t* buckets,
                     int64_t bucket_stride, int64_t rounds, int64_t n_buckets, int64_t window,
                     int64_t capacity, int64_t end, bool once, std::vector<int32_t>& found) {
  found.clear();
  for (int64_t r = 0; r < rounds; ++r) {
    const int64_t bucket = buckets[r * bucket_stride];
    if (bucket < 0 || bucket >= n_buckets) continue;  // padding
    const int32_t* slots = table + (r * n_buckets + bucket) * window;
    const int64_t held = std::min<int64_t>(counts[r * n_buckets + bucket], window);
    found.insert(found.end(), slots, slots + std::max<int64_t>(held, 0));
  }
  for (const int32_t position : found) {
    REFORMER_CHECK(position >= 0 && position < capacity,
                   "lsh_decode: expected table with positions in [0, ", capacity, "), got ",
                   position);
  }
  if (end < capacity) {  // not std::erase_if: torch 2.11 builds as C++17
    const auto beyond = [&](int32_t position) { return position >= end; };
    found.erase(std::remove_if(found.begin(), found.end(), beyond), found.end());
  }
  if (!once) return;
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
}

// out [D] in the wide type; the lse. `weights` is scratch of found.size().
template <typename S, typename T>
REFORMER_CLONES T attend(const S* q, const S* keys, const S* values, int64_t head_dim, T scale,
                         const std::vector<int32_t>& found, T* weights, T* out) {
  T peak = -std::numeric_limits<T>::infinity();
  for (size_t i = 0; i < found.size(); ++i) {
    const S* key = keys + found[i] * head_dim;
    T sums[16] = {};  // the compiler keeps them in vectors
    int64_t d = 0;
    for (; d + 16 <= head_dim; d += 16) {
      for (int64_t lane = 0; lane < 16; ++lane) {
        sums[lane] += static_cast<T>(q[d + lane]) * static_cast<T>(key[d + lane]);
      }
    }
    T sum = 0;
    for (; d < head_dim; ++d) sum += static_cast<T>(q[d]) * static_cast<T>(key[d]);
    for (const T part : sums) sum += part;
    weights[i] = scale * sum;
    peak = std::max(peak, weights[i]);
  }
  T total = 0;
  std::fill_n(out, head_dim, T(0));
  for (size_t i = 0; i < found.size(); ++i) {
    const T weight = std::exp(weights[i] - peak);
    const S* value = values + found[i] * head_dim;
    total += weight;
    for (int64_t d = 0; d < head_dim; ++d) out[d] += weight * static_cast<T>(value[d]);
  }
  for (int64_t d = 0; d < head_dim; ++d) out[d] /= total;
  return peak + std::log(total);
}

template <typename S>
void decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& table, const at::Tensor& counts, const at::Tensor& buckets,
            const at::Tensor& own_values, double scale, bool correct_duplicates,
            const at::Tensor& before, const at::Tensor& out, const at::Tensor& lse) {
  using T = Wide<S>;
  const int64_t heads = q.size(1), n = q.size(2), head_dim = q.size(3), capacity = keys.size(2);
  const int64_t rounds = table.size(2), n_buckets = table.size(3), window = table.size(4);
  const auto row = [&](const at::Tensor& x, int64_t head, int64_t i) {
    return static_cast<S*>(x.data_ptr()) + head / heads * x.stride(0) + head % heads * x.stride(1) +
           i * x.stride(2);
  };
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (rounds * window * head_dim));
  at::parallel_for(0, q.size(0) * heads * n, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> found;
    std::vector<T> weights(rounds * window), wide(head_dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / n, i = task % n;
      find_candidates(
          table.const_data_ptr<int32_t>() + head * rounds * n_buckets * window,
          counts.const_data_ptr<int32_t>() + head * rounds * n_buckets,
          buckets.const_data_ptr<int32_t>() + head * rounds * n + i, n, rounds, n_buckets, window,
          capacity,
          before.defined() ? before.const_data_ptr<int64_t>()[head / heads] + i : capacity,
          correct_duplicates, found);
      S* to = row(out, head, i);
      T* total = lse.mutable_data_ptr<T>() + task;
      if (!found.empty()) {
        *total = attend<S, T>(row(q, head, i), row(keys, head, 0), row(values, head, 0), head_dim,
                              static_cast<T>(scale), found, weights.data(), wide.data());
        std::copy(wide.begin(), wide.end(), to);
      } else if (own_values.defined()) {
        *total = static_cast<T>(kSelfOnlyLse);
        std::copy_n(row(own_values, head, i), head_dim, to);
      } else {
        *total = -std::numeric_limits<T>::infinity();
        std::fill_n(to, head_dim, S(0));
      }
    }
  });
}

at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

std::tuple<at::Tensor, at::Tensor> lsh_decode_cpu(
    const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
    const at::Tensor& counts, const at::Tensor& buckets,
    const std::optional<at::Tensor>& own_values, std::optional<double> scale,
    bool correct_duplicates, const std::optional<at::Tensor>& before) {
  check_lsh_decode(q, keys, values, table, counts, buckets, own_values, scale, before);
  const auto results = lsh_decode_output(q);
  const auto& [out, lse] = results;
  if (out.numel() == 0) return results;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "lsh_decode", [&, &out = out, &lse = lse] {
        decode<scalar_t>(with_dense_rows(q), keys, values, table, counts, buckets.contiguous(),
                         own_values.has_value() ? with_dense_rows(*own_values) : at::Tensor(),
                         decode_scale(q, scale), correct_duplicates,
                         before.has_value() ? before->contiguous() : at::Tensor(), out, lse);
      });
  return results;
}

void lsh_cache_append_cpu(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                          const at::Tensor& counts, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& buckets, const at::Tensor& lengths, bool normalize,
                          const std::optional<at::Tensor>& value_mix,
                          const std::optional<at::Tensor>& last_values) {
  check_lsh_cache_append(keys, values, table, counts, k, v, buckets, lengths, value_mix,
                         last_values);
  if (k.numel() == 0) return;
  const int64_t batch = k.size(0), heads = k.size(1), n = k.size(2), capacity = keys.size(2);
  const int64_t rounds = table.size(2), n_buckets = table.size(3), window = table.size(4);
  const at::Tensor wanted = buckets.contiguous(), begins = lengths.contiguous();
  const at::Tensor new_keys = normalize ? unit_rows(k) : k;
  const int64_t* begin_of = begins.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {  // all before anything is written
    REFORMER_CHECK(begin_of[b] >= 0, "lsh_cache_append: expected lengths >= 0, got ", begin_of[b]);
  }
  const at::Tensor new_values =
      value_mix.has_value()
          ? append_next_values(values, v, buckets, lengths, n_buckets, *value_mix, *last_values)
          : v;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = std::min(begin_of[b], capacity), room = std::min(n, capacity - first);
    for (const auto& [cache, rows] : {std::pair{keys, new_keys}, std::pair{values, new_values}}) {
      cache.select(0, b).narrow(1, first, room).copy_(rows.select(0, b).narrow(1, 0, room));
    }
  }
  int32_t* slots = table.mutable_data_ptr<int32_t>();
  int32_t* count = counts.mutable_data_ptr<int32_t>();
  const int32_t* bucket = wanted.const_data_ptr<int32_t>();
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / n);
  at::parallel_for(0, batch * heads * rounds, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = begin_of[line / rounds / heads];
      for (int64_t i = 0; i < std::min(n, capacity - first); ++i) {
        const int64_t b = bucket[line * n + i];
        if (b < 0 || b >= n_buckets) continue;  // padding
        int32_t& held = count[line * n_buckets + b];
        REFORMER_CHECK(held >= 0, "lsh_cache_append: expected counts >= 0, got ", held);
        slots[(line * n_buckets + b) * window + held % window] = static_cast<int32_t>(first + i);
        ++held;
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) {
  m.impl("lsh_decode", &lsh_decode_cpu);
  m.impl("lsh_cache_append", &lsh_cache_append_cpu);
}

}  // namespace reformer

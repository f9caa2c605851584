// lsh_hash on the CPU: blocks of positions, one matrix product each and an argmax over its rows.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "lanes.h"
#include "lsh_hash_common.h"

namespace reformer {
namespace {

// Digit of one factor for kSize positions: argmax([p; -p]) over `half` rows p of `projected`, the
// lowest index among equals. NaN never wins.
template <typename T>
REFORMER_INLINE IntegerVector<T> digits(const T* projected, int64_t row, Integer<T> half) {
  Vector<T> highest = Vector<T>{} - std::numeric_limits<T>::infinity(), lowest = -highest;
  IntegerVector<T> highest_at{}, lowest_at{};
  for (Integer<T> c = 0; c < half; ++c) {
    const Vector<T> p = load(projected + c * row);
    highest_at = p > highest ? IntegerVector<T>{} + c : highest_at;
    highest = p > highest ? p : highest;
    lowest_at = p < lowest ? IntegerVector<T>{} + c : lowest_at;
    lowest = p < lowest ? p : lowest;
  }
  return highest >= -lowest ? highest_at : lowest_at + half;
}

// projected [rounds * columns, row] -> buckets [rounds, bucket_row]; row is a multiple of the
// lanes.
template <typename T>
REFORMER_CLONES void assign_buckets(const T* projected, int64_t row, int64_t positions,
                                    int64_t rounds, const int64_t* factors, int64_t n_factors,
                                    int32_t* buckets, int64_t bucket_row) {
  for (int64_t r = 0; r < rounds; ++r) {
    const T* columns = projected;
    for (int64_t f = 0; f < n_factors; ++f) projected += factors[f] / 2 * row;
    for (int64_t i = 0; i < positions; i += Lanes<T>::kSize) {
      IntegerVector<T> bucket{};
      Integer<T> place = 1;
      const T* column = columns + i;
      for (int64_t f = 0; f < n_factors; ++f) {
        const auto factor = static_cast<Integer<T>>(factors[f]);
        bucket += place * digits<T>(column, row, factor / 2);
        place *= factor;
        column += factor / 2 * row;
      }
      const int64_t n = std::min<int64_t>(Lanes<T>::kSize, positions - i);
      for (int64_t lane = 0; lane < n; ++lane) {
        buckets[r * bucket_row + i + lane] = static_cast<int32_t>(bucket[lane]);
      }
    }
  }
}

template <typename T>
void hash_heads(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                int32_t* buckets) {
  const int64_t heads = x.size(1), length = x.size(2), rounds = rotations.size(2);
  const int64_t rows = rounds * rotations.size(3);
  // [H or 1, R * columns, D]
  const at::Tensor projections =
      rotations.to(c10::CppTypeToScalarType<T>::value).flatten(2).transpose(1, 2).contiguous();
  constexpr int64_t lanes = Lanes<T>::kSize;
  // The product of a block fits a core's cache.
  const int64_t block =
      std::min<int64_t>(std::clamp<int64_t>(65536 / rows, 64, 1024) / lanes * lanes,
                        (length + lanes - 1) / lanes * lanes);
  const int64_t blocks = (length + block - 1) / block;
  // A few positions of few heads, as in decoding, are not worth waking a thread for.
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (rows * x.size(3) * block));

  at::parallel_for(0, x.size(0) * heads * blocks, grain, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // thread-local
    const at::Tensor projected = at::empty({rows, block}, projections.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, first = task % blocks * block;
      const int64_t positions = std::min(block, length - first);
      const at::Tensor vectors = x.select(0, head / heads)
                                     .select(0, head % heads)
                                     .narrow(0, first, positions)
                                     .to(projections.scalar_type());
      at::Tensor target = projected.narrow(1, 0, positions);
      at::mm_out(target, projections.select(0, rotations.size(0) == 1 ? 0 : head % heads),
                 vectors.t());
      assign_buckets<T>(projected.const_data_ptr<T>(), block, positions, rounds, n_buckets.data(),
                        static_cast<int64_t>(n_buckets.size()),
                        buckets + head * rounds * length + first, length);
    }
  });
}

at::Tensor lsh_hash_cpu(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                        const std::optional<at::Tensor>& key_padding_mask) {
  check_lsh_hash(x, rotations, n_buckets, key_padding_mask);
  at::Tensor buckets = lsh_hash_output(x, rotations);
  if (buckets.numel() == 0) return buckets;
  if (x.scalar_type() == at::kDouble) {
    hash_heads<double>(x, rotations, n_buckets, buckets.mutable_data_ptr<int32_t>());
  } else {
    hash_heads<float>(x, rotations, n_buckets, buckets.mutable_data_ptr<int32_t>());
  }
  if (key_padding_mask.has_value()) {
    buckets.masked_fill_(key_padding_mask->unsqueeze(1).unsqueeze(2),
                         check_n_buckets("lsh_hash", n_buckets));
  }
  return buckets;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) { m.impl("lsh_hash", &lsh_hash_cpu); }

}  // namespace reformer

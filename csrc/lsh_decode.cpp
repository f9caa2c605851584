// lsh_decode and lsh_cache_append: schemas, checks, Meta, public functions, and kernels composed of
// ATen operators, for devices without their own and for what CUDA's do not take. Those read no
// value on the host and have fixed shapes, so that a decoding step can be captured in a CUDA graph.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "chunked_attention_common.h"
#include "lsh_decode_common.h"
#include "reformer.h"

namespace reformer {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The cache: keys and values [B, H, C, D] of x's dtype, table int32 [B, H, R, N, W], counts int32
// [B, H, R, N], all contiguous; x [B, H, T, D] and buckets int32 [B, H, R, T] beside it.
void check_cache(const char* op, const at::Tensor& keys, const at::Tensor& values,
                 const at::Tensor& table, const at::Tensor& counts, const char* name,
                 const at::Tensor& x, const at::Tensor& buckets) {
  check_heads(op, name, x);
  check_rank(op, "keys", keys, 4, "[B, H, C, D]");
  check_shape(op, "keys", keys, {x.sym_size(0), x.sym_size(1), keys.sym_size(2), x.sym_size(3)},
              "(batch, heads, capacity, head dimension)");
  REFORMER_CHECK(keys.sym_size(2) >= 1, op, ": expected keys with at least one place, got ",
                 keys.sym_sizes());
  check_shape(op, "values", values, keys.sym_sizes(), "like keys");
  check_rank(op, "table", table, 5, "[B, H, R, N, W]");
  check_rank(op, "buckets", buckets, 4, "[B, H, R, T]");
  const c10::SymInt rounds = buckets.sym_size(2);
  check_shape(op, "table", table,
              {x.sym_size(0), x.sym_size(1), rounds, table.sym_size(3), table.sym_size(4)},
              "(batch, heads, rounds, buckets, window)");
  REFORMER_CHECK(rounds >= 1 && table.sym_size(3) >= 1 && table.sym_size(4) >= 1, op,
                 ": expected table with at least one round, bucket and slot, got ",
                 table.sym_sizes());
  check_shape(op, "counts", counts, table.sym_sizes().slice(0, 4), "like table without its slots");
  check_shape(op, "buckets", buckets, {x.sym_size(0), x.sym_size(1), rounds, x.sym_size(2)},
              "(batch, heads, rounds, new positions)");
  check_dtype(op, "keys", keys, x.scalar_type());
  check_dtype(op, "values", values, x.scalar_type());
  for (const auto& [part, tensor] :
       {std::pair{"table", table}, std::pair{"counts", counts}, std::pair{"buckets", buckets}}) {
    check_dtype(op, part, tensor, at::kInt);
    check_device(op, part, tensor, x);
  }
  for (const auto& [part, tensor] : {std::pair{"keys", keys}, std::pair{"values", values}}) {
    check_device(op, part, tensor, x);
  }
  for (const auto& [part, tensor] : {std::pair{"keys", keys}, std::pair{"values", values},
                                     std::pair{"table", table}, std::pair{"counts", counts}}) {
    REFORMER_CHECK(tensor.is_contiguous(), op, ": expected a contiguous ", part, ", got strides ",
                   tensor.sym_strides());
  }
}

// int64 [B]
void check_positions(const char* op, const char* name, const at::Tensor& positions,
                     const at::Tensor& x) {
  check_shape(op, name, positions, {x.sym_size(0)}, "(batch)");
  check_dtype(op, name, positions, at::kLong);
  check_device(op, name, positions, x);
}

}  // namespace

void check_lsh_decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                      const at::Tensor& table, const at::Tensor& counts, const at::Tensor& buckets,
                      const std::optional<at::Tensor>& own_values, std::optional<double> scale,
                      const std::optional<at::Tensor>& before) {
  constexpr const char* op = "lsh_decode";
  check_cache(op, keys, values, table, counts, "q", q, buckets);
  if (own_values.has_value()) check_like(op, "own_values", *own_values, q, "like q");
  check_scale(op, scale, q);
  if (before.has_value()) check_positions(op, "before", *before, q);
}

void check_lsh_cache_append(const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& table, const at::Tensor& counts, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& buckets,
                            const at::Tensor& lengths, const std::optional<at::Tensor>& value_mix,
                            const std::optional<at::Tensor>& last_values) {
  constexpr const char* op = "lsh_cache_append";
  check_cache(op, keys, values, table, counts, "k", k, buckets);
  check_like(op, "v", v, k, "like k");
  check_positions(op, "lengths", lengths, k);
  REFORMER_CHECK(value_mix.has_value() == last_values.has_value(), op,
                 ": expected value_mix and last_values together, got ",
                 value_mix.has_value() ? "value_mix alone" : "last_values alone");
  if (!value_mix.has_value()) return;
  check_shape(op, "value_mix", *value_mix, {2, k.sym_size(1)}, "(own and next, heads)");
  check_float(op, "value_mix", *value_mix);
  check_device(op, "value_mix", *value_mix, k);
  check_shape(op, "last_values", *last_values, {k.sym_size(0), k.sym_size(1), k.sym_size(3)},
              "(batch, heads, head dimension)");
  check_dtype(op, "last_values", *last_values, k.scalar_type());
  check_device(op, "last_values", *last_values, k);
  REFORMER_CHECK(last_values->is_contiguous(), op,
                 ": expected a contiguous last_values, got strides ", last_values->sym_strides());
}

std::tuple<at::Tensor, at::Tensor> lsh_decode_output(const at::Tensor& q) {
  return {chunked_attention_output(q), chunked_attention_lse(q)};
}

namespace {

std::tuple<at::Tensor, at::Tensor> lsh_decode_meta(
    const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
    const at::Tensor& counts, const at::Tensor& buckets,
    const std::optional<at::Tensor>& own_values, std::optional<double> scale, bool,
    const std::optional<at::Tensor>& before) {
  check_lsh_decode(q, keys, values, table, counts, buckets, own_values, scale, before);
  return lsh_decode_output(q);
}

void lsh_cache_append_meta(const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& table, const at::Tensor& counts, const at::Tensor& k,
                           const at::Tensor& v, const at::Tensor& buckets,
                           const at::Tensor& lengths, bool,
                           const std::optional<at::Tensor>& value_mix,
                           const std::optional<at::Tensor>& last_values) {
  check_lsh_cache_append(keys, values, table, counts, k, v, buckets, lengths, value_mix,
                         last_values);
}

// Rows of x [B, H, C, D] at positions [B, H, n].
at::Tensor rows_at(const at::Tensor& x, const at::Tensor& positions) {
  return x.gather(2, positions.unsqueeze(-1).expand({-1, -1, -1, x.size(3)}));
}

}  // namespace

at::Tensor unit_rows(const at::Tensor& x) {
  const at::Tensor wide = x.to(chunked_attention_lse(x).scalar_type());
  return wide.div(at::linalg_vector_norm(wide, 2, {-1}, true).clamp_min(1e-12)).to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> lsh_decode_composite(
    const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
    const at::Tensor& counts, const at::Tensor& buckets,
    const std::optional<at::Tensor>& own_values, std::optional<double> scale,
    bool correct_duplicates, const std::optional<at::Tensor>& before) {
  check_lsh_decode(q, keys, values, table, counts, buckets, own_values, scale, before);
  const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2), head_dim = q.size(3);
  const int64_t rounds = table.size(2), n_buckets = table.size(3), window = table.size(4);
  const auto [out, lse] = lsh_decode_output(q);
  const at::ScalarType wide = lse.scalar_type();

  // The slots of each query's buckets, [B, H, T, R * W].
  const at::Tensor bucket = buckets.clamp(0, n_buckets - 1).to(at::kLong);  // [B, H, R, T]
  const at::Tensor held = counts.gather(3, bucket);
  const at::Tensor slots = at::arange(window, table.options().dtype(at::kLong));
  const at::Tensor index = (bucket.unsqueeze(-1) * window + slots).flatten(3);  // [B, H, R, T * W]
  const auto by_query = [&](const at::Tensor& x) {  // [B, H, R, T, W] -> [B, H, T, R * W]
    return x.view({batch, heads, rounds, n, window}).transpose(2, 3).flatten(3);
  };
  at::Tensor position = by_query(table.flatten(3).gather(3, index)).to(at::kLong);
  at::Tensor valid = by_query(
      (slots < held.unsqueeze(-1)).logical_and((buckets == bucket).unsqueeze(-1)).contiguous());
  if (before.has_value()) {
    const at::Tensor end = before->unsqueeze(1) + at::arange(n, before->options());  // [B, T]
    valid = valid.logical_and(position < end.view({batch, 1, n, 1}));
  }
  position = at::where(valid, position, keys.size(2)).clamp(0, keys.size(2));
  if (correct_duplicates) {
    position = std::get<0>(position.sort(-1));
    const at::Tensor first = at::ones_like(position.narrow(-1, 0, 1)).to(at::kBool);
    const int64_t others = position.size(-1) - 1;
    valid = at::cat({first, position.narrow(-1, 1, others) != position.narrow(-1, 0, others)}, -1);
  }
  valid = valid.logical_and(position < keys.size(2));

  const at::Tensor flat = position.clamp_max(keys.size(2) - 1).flatten(2);  // [B, H, T * R * W]
  const auto gathered = [&](const at::Tensor& x) {
    const at::Tensor rows =
        rows_at(x, flat).view({batch, heads, n, rounds * window, head_dim}).to(wide);
    return rows.masked_fill(valid.logical_not().unsqueeze(-1), 0);  // a slot never filled is noise
  };
  const at::Tensor logits =
      (at::matmul(gathered(keys), q.to(wide).unsqueeze(-1)).squeeze(-1) * decode_scale(q, scale))
          .masked_fill(valid.logical_not(), -kInfinity);
  const at::Tensor lone = valid.any(-1).logical_not();  // [B, H, T]
  const at::Tensor total = logits.logsumexp(-1);
  const at::Tensor weights = (logits - total.masked_fill(lone, 0).unsqueeze(-1)).exp();
  at::Tensor result =
      at::matmul(weights.unsqueeze(-2), gathered(values)).squeeze(-2).to(q.scalar_type());
  if (own_values.has_value()) result = at::where(lone.unsqueeze(-1), *own_values, result);
  out.copy_(result);
  lse.copy_(own_values.has_value() ? total.masked_fill(lone, kSelfOnlyLse) : total);
  return {out, lse};
}

at::Tensor append_next_values(const at::Tensor& values, const at::Tensor& v,
                              const at::Tensor& buckets, const at::Tensor& lengths,
                              int64_t n_buckets, const at::Tensor& value_mix,
                              const at::Tensor& last_values) {
  const int64_t n = v.size(2), capacity = values.size(2);
  const at::Tensor first_round = buckets.select(2, 0);  // [B, H, T]
  const at::Tensor real =
      (first_round >= 0).logical_and(first_round < n_buckets).unsqueeze(-1);  // [B, H, T, 1]
  const at::Tensor factors =
      value_mix.to(chunked_attention_lse(v).scalar_type()).view({2, 1, v.size(1), 1, 1});
  const auto mix = [&](const at::Tensor& own, const at::Tensor& next) {
    return (factors[0] * own + factors[1] * next).to(v.scalar_type());
  };

  const at::Tensor last = last_values.unsqueeze(2);
  const at::Tensor completed = mix(last, at::where(real.narrow(2, 0, 1), v.narrow(2, 0, 1), last));
  const at::Tensor place = (lengths - 1).view({-1, 1, 1, 1});
  const at::Tensor target = place.clamp(0, capacity - 1).expand_as(completed);
  const at::Tensor there = (place >= 0).logical_and(place < capacity);
  values.scatter_(2, target, at::where(there, completed, values.gather(2, target)));

  const at::Tensor own = v.narrow(2, 0, n - 1), next = v.narrow(2, 1, n - 1);
  const at::Tensor mixed = mix(own, at::where(real.narrow(2, 1, n - 1), next, own));
  const at::Tensor rows =
      at::cat({at::where(real.narrow(2, 0, n - 1), mixed, own), v.narrow(2, n - 1, 1)}, 2);

  const at::Tensor numbers = at::arange(1, n + 1, lengths.options()).view({1, 1, n, 1});
  const at::Tensor newest = (numbers * real).amax(2, true);  // [B, H, 1, 1], 0: there is none
  const at::Tensor found = v.gather(2, (newest - 1).clamp_min(0).expand_as(last));
  last_values.copy_(at::where(newest > 0, found, last).squeeze(2));
  return rows;
}

void lsh_cache_append_composite(const at::Tensor& keys, const at::Tensor& values,
                                const at::Tensor& table, const at::Tensor& counts,
                                const at::Tensor& k, const at::Tensor& v, const at::Tensor& buckets,
                                const at::Tensor& lengths, bool normalize,
                                const std::optional<at::Tensor>& value_mix,
                                const std::optional<at::Tensor>& last_values) {
  check_lsh_cache_append(keys, values, table, counts, k, v, buckets, lengths, value_mix,
                         last_values);
  const int64_t batch = k.size(0), heads = k.size(1), n = k.size(2), capacity = keys.size(2);
  const int64_t rounds = table.size(2), n_buckets = table.size(3), window = table.size(4);
  if (k.numel() == 0) return;
  const at::Tensor place = lengths.unsqueeze(1) + at::arange(n, lengths.options());  // [B, T]
  const at::Tensor room = place < capacity;

  // A row beyond the capacity repeats what goes to the last place, so that no two writes differ.
  const at::Tensor last_row = (capacity - 1 - lengths).unsqueeze(1);  // below 0: there is none
  const at::Tensor source =
      at::minimum(at::arange(n, lengths.options()), last_row.clamp_min(0)).view({batch, 1, n, 1});
  const at::Tensor target = place.clamp_max(capacity - 1).view({batch, 1, n, 1}).expand_as(k);
  const at::Tensor any_room = (last_row >= 0).view({batch, 1, 1, 1});
  const auto write = [&](const at::Tensor& cache, const at::Tensor& x) {
    const at::Tensor rows = x.gather(2, source.expand_as(x));
    cache.scatter_(2, target, at::where(any_room, rows, cache.gather(2, target)));
  };
  write(keys, normalize ? unit_rows(k) : k);
  write(values, value_mix.has_value() ? append_next_values(values, v, buckets, lengths, n_buckets,
                                                           *value_mix, *last_values)
                                      : v);

  const at::Tensor wanted = (buckets >= 0)
                                .logical_and(buckets < n_buckets)
                                .logical_and(room.view({batch, 1, 1, n}));  // [B, H, R, T]
  const at::Tensor bucket = at::where(wanted, buckets, n_buckets);          // the rest comes last
  const at::Tensor slots = table.flatten(3);
  if (n == 1) {  // one slot of each round, at constant cost
    const at::Tensor of = bucket.clamp_max(n_buckets - 1).to(at::kLong);
    const at::Tensor count = counts.gather(3, of);
    const at::Tensor slot = of * window + count % window;
    const at::Tensor position = place.view({batch, 1, 1, 1}).to(at::kInt).expand_as(bucket);
    slots.scatter_(3, slot, at::where(wanted, position, slots.gather(3, slot)));
    counts.scatter_(3, of, count + wanted.to(at::kInt));
    return;
  }
  // Every slot looks up the newest position that belongs there: no two writes meet.
  const at::Tensor order = bucket_sort(bucket.to(at::kInt), n_buckets + 1).to(at::kLong);
  const at::Tensor edges = at::arange(n_buckets + 1, bucket.options().dtype(at::kInt))
                               .expand({batch, heads, rounds, n_buckets + 1})
                               .contiguous();
  const at::Tensor starts =
      at::searchsorted(bucket.to(at::kInt).gather(3, order).contiguous(), edges);
  const at::Tensor start = starts.narrow(3, 0, n_buckets).unsqueeze(-1);  // [B, H, R, N, 1]
  const at::Tensor old_count = counts.unsqueeze(-1).to(at::kLong);
  const at::Tensor new_count = old_count + starts.narrow(3, 1, n_buckets).unsqueeze(-1) - start;
  const at::Tensor last = new_count - 1;
  const at::Tensor age =
      (last - at::arange(window, order.options())).remainder(window);  // of a slot's newest
  const at::Tensor number = last - age;  // counted from the first ever
  const at::Tensor fresh = number >= old_count;
  const at::Tensor found =
      order.gather(3, (start + number - old_count).clamp(0, n - 1).flatten(3)).view_as(table);
  table.copy_(at::where(fresh, found + lengths.view({batch, 1, 1, 1, 1}), table));
  counts.copy_(new_count.squeeze(-1));
}

std::tuple<at::Tensor, at::Tensor> lsh_decode(const at::Tensor& q, const at::Tensor& keys,
                                              const at::Tensor& values, const at::Tensor& table,
                                              const at::Tensor& counts, const at::Tensor& buckets,
                                              const std::optional<at::Tensor>& own_values,
                                              std::optional<double> scale, bool correct_duplicates,
                                              const std::optional<at::Tensor>& before) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_decode", "")
                             .typed<decltype(lsh_decode)>();
  return op.call(q, keys, values, table, counts, buckets, own_values, scale, correct_duplicates,
                 before);
}

void lsh_cache_append(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                      const at::Tensor& counts, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& buckets, const at::Tensor& lengths, bool normalize,
                      const std::optional<at::Tensor>& value_mix,
                      const std::optional<at::Tensor>& last_values) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_cache_append", "")
                             .typed<decltype(lsh_cache_append)>();
  op.call(keys, values, table, counts, k, v, buckets, lengths, normalize, value_mix, last_values);
}

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def(
      "lsh_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor counts, "
      "Tensor buckets, *, Tensor? own_values=None, float? scale=None, "
      "bool correct_duplicates=False, Tensor? before=None) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lsh_cache_append(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) table, Tensor(d!) counts, "
      "Tensor k, Tensor v, Tensor buckets, Tensor lengths, *, bool normalize=False, "
      "Tensor? value_mix=None, Tensor(e!)? last_values=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(reformer, Meta, m) {
  m.impl("lsh_decode", &lsh_decode_meta);
  m.impl("lsh_cache_append", &lsh_cache_append_meta);
}

TORCH_LIBRARY_IMPL(reformer, CompositeExplicitAutograd, m) {
  m.impl("lsh_decode", &lsh_decode_composite);
  m.impl("lsh_cache_append", &lsh_cache_append_composite);
}

TORCH_LIBRARY_IMPL(reformer, Autograd, m) {
  m.impl("lsh_decode", torch::autograd::autogradNotImplementedFallback());
  m.impl("lsh_cache_append", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace reformer

// chunked_attention on the CPU. The line of chunks is cut into blocks of chunks of one round; a
// block gathers its rows once and multiplies them tile by tile, so memory does not grow with rounds
// or windows.
//
// Results have the same bits for any number of threads: whatever adds to the same row does so in a
// fixed order. Forward: rounds follow each other, and in a round every query is in one block.
// Backward: blocks that write the keys of a common chunk are in different phases.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "chunked_attention_common.h"
#include "cpu/gathered.h"
#include "cpu/line.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"
#include "lanes.h"

namespace reformer {
namespace {

// Forward
// ------------------------------------------------------------------------------------------

// A head's results: out and lse hold the running numerator and peak until the last round.
template <typename T>
struct Accumulators {
  T* out;
  int64_t out_stride;
  T* peak;
  T* total;
  bool first_round, last_round;
};

// Joins a round's rows to those of the rounds before.
template <typename T>
REFORMER_INLINE void join_row(const Accumulators<T>& into, int64_t position, const T* row, T peak,
                              T total, int64_t head_dim) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T* out = into.out + position * into.out_stride;
  const T old_peak = into.first_round ? -infinity : into.peak[position];
  const T old_total = into.first_round ? T(0) : into.total[position];
  const T new_peak = std::max(old_peak, peak);
  const T shift = new_peak == -infinity ? T(0) : new_peak;
  T new_share = std::exp(peak - shift), old_share = std::exp(old_peak - shift);
  const T new_total = total * new_share + old_total * old_share;
  into.total[position] = new_total;
  into.peak[position] = new_peak;
  if (into.last_round && new_total != 0) {
    into.peak[position] = stored_lse(new_peak + std::log(new_total));
    new_share /= new_total;
    old_share /= new_total;
  }
  if (into.first_round) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = row[d] * new_share;
  } else {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = row[d] * new_share + out[d] * old_share;
  }
}

// What one thread needs for the blocks it works on.
template <typename T>
struct ForwardScratch {
  Gathered<T> block;
  Buffer<T> keys_t;         // [head_dim, key_stride]
  Buffer<T> values;         // [key_stride, width]
  Buffer<T> scores;         // [tile_rows, columns]
  Buffer<T> rows;           // [tile_rows, width]
  Buffer<T> peaks, totals;  // [tile_rows]

  explicit ForwardScratch(const Problem<T>& p)
      : block(p),
        keys_t(p.head_dim * block.key_stride),
        values(block.key_stride * p.width),
        scores(block.tile_rows * block.columns),
        rows(block.tile_rows * p.width),
        peaks(block.tile_rows),
        totals(block.tile_rows) {}
};

template <typename T>
REFORMER_CLONES void attend(ForwardScratch<T>& scratch, const typename Gathered<T>::Tile& tile,
                            const Accumulators<T>& into) {
  Gathered<T>& block = scratch.block;
  const Problem<T>& p = block.p;
  const int64_t width = p.width, columns = block.columns;
  T *scores = scratch.scores.get(), *rows = scratch.rows.get();
  T *peaks = scratch.peaks.get(), *totals = scratch.totals.get();
  multiply(block.queries() + tile.begin * width, width, 1, scratch.keys_t.get() + tile.first_key,
           block.key_stride, scores, columns, tile.n, tile.keys.columns, p.head_dim, false);
  for (int64_t i = 0; i < tile.n; ++i) {
    exponentiate_row(tile.keys, block.query(tile.begin + i), scores + i * columns, peaks[i],
                     totals[i]);
  }
  multiply(scores, columns, 1, scratch.values.get() + tile.first_key * width, width, rows, width,
           tile.n, pad_to_lanes<T>(p.head_dim), tile.n_keys, false);
  const Integer<T>* positions = block.query_positions() + tile.begin;
  for (int64_t i = 0; i < tile.n; ++i) {
    join_row(into, positions[i], rows + i * width, peaks[i], totals[i], p.head_dim);
  }
}

template <typename T>
void forward(const ChunkedAttentionArgs& args, const at::Tensor& out, const at::Tensor& lse) {
  const Problem<T> p(args);
  const Rows out_rows(out);
  T* lse_data = lse.template mutable_data_ptr<T>();
  const Buffer<T> total(lse.numel());

  for_each_block(p.batch * p.heads, forward_phases(p.line), [&] {
    return [&, scratch = ForwardScratch<T>(p)](int64_t head, const Block& b) mutable {
      Gathered<T>& block = scratch.block;
      block.read(head, b);
      block.gather_values(scratch.values.get());
      transpose(block.keys(), p.width, block.padded_rows(), p.head_dim, scratch.keys_t.get(),
                block.key_stride);
      const Accumulators<T> into{out_rows.head<T>(head),     out_rows.stride(),
                                 lse_data + head * p.length, total.get() + head * p.length,
                                 block.round == 0,           block.round == p.line.rounds - 1};
      block.for_each_tile(
          [&](const typename Gathered<T>::Tile& tile) { attend(scratch, tile, into); });
    };
  });

  // Queries without a key: themselves, or nothing.
  at::parallel_for(0, lse.numel(), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (total.get()[i] != 0) continue;
      const int64_t head = i / p.length, position = i % p.length;
      T* row = out_rows.head<T>(head) + position * out_rows.stride();
      if (p.mask_self && !p.is_padding(head, position)) {
        visit_head<T>(p.own, head, [&](const auto* values) {
          convert_row(values + position * p.own.stride(), p.head_dim, row);
        });
        lse_data[i] = static_cast<T>(kSelfOnlyLse);
      } else {
        std::fill_n(row, p.head_dim, T(0));
        lse_data[i] = -std::numeric_limits<T>::infinity();
      }
    }
  });
}

// A tensor to compute into: x itself, or a wider one like it.
at::Tensor computing(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16
             ? at::empty_like(x, x.options().dtype(at::kFloat))
             : x;
}

void finish(const at::Tensor& x, const at::Tensor& computed) {
  if (!x.is_same(computed)) x.copy_(computed);
}

std::tuple<at::Tensor, at::Tensor> chunked_attention_cpu(const ChunkedAttentionArgs& args) {
  const at::Tensor out = chunked_attention_output(args.q), lse = chunked_attention_lse(args.q);
  if (out.numel() == 0) return {out, lse};
  const at::Tensor computed = computing(out);
  if (lse.scalar_type() == at::kDouble) {
    forward<double>(args, computed, lse);
  } else {
    forward<float>(args, computed, lse);
  }
  finish(out, computed);
  return {out, lse};
}

// Backward
// -----------------------------------------------------------------------------------------

// delta_i = dout_i . out_i - dlse_i, whether both cotangents are zero (then the query contributes
// nothing to any gradient, whatever it is), and, if that is asked for, the value's gradient of a
// query that saw only itself.
template <typename T, typename S>
REFORMER_CLONES void begin_gradients(const S* out, int64_t out_stride, const S* grad_out,
                                     int64_t grad_stride, int64_t n, int64_t head_dim, bool pass_on,
                                     const T* lse, const T* grad_lse, T* delta, uint8_t* silent,
                                     T* grad_v, int64_t grad_v_stride) {
  T out_scratch[kMaxHeadDim], grad_scratch[kMaxHeadDim];
  for (int64_t i = 0; i < n; ++i) {
    const T* grad = computing_row(grad_out + i * grad_stride, head_dim, grad_scratch);
    delta[i] = dot(grad, computing_row(out + i * out_stride, head_dim, out_scratch), head_dim);
    if (grad_lse) delta[i] -= grad_lse[i];
    bool any = grad_lse && grad_lse[i] != T(0);
    for (int64_t d = 0; d < head_dim; ++d) any |= grad[d] != T(0);
    silent[i] = !any;
    if (pass_on && lse[i] == static_cast<T>(kSelfOnlyLse)) {
      std::copy_n(grad, head_dim, grad_v + i * grad_v_stride);
    }
  }
}

// Gradients of unit-length keys, over |q_j| -> those of q_j: the part along the key vanishes.
template <typename T>
REFORMER_CLONES void project(const T* keys, int64_t width, const Integer<T>* positions, int64_t n,
                             const T* inverse_norm, T clamped, int64_t head_dim, T* grads) {
  for (int64_t i = 0; i < n; ++i) {
    if (positions[i] < 0) continue;
    const T inverse = inverse_norm[positions[i]];
    if (inverse == clamped) continue;  // a clamped norm is a constant
    const T* key = keys + i * width;
    T* grad = grads + i * width;
    const T along = dot(grad, key, head_dim) * inverse * inverse;
    for (int64_t d = 0; d < head_dim; ++d) grad[d] -= along * key[d];
  }
}

// What one thread needs for the blocks it works on.
template <typename T>
struct BackwardScratch {
  Gathered<T> block;
  Buffer<T> keys_t, values_t;        // [head_dim, key_stride]
  Buffer<T> grad_out;                // [key_stride, width], of the block's queries
  Buffer<T> scores, grad_scores;     // [tile_rows, columns]
  Buffer<T> grad_queries;            // [tile_rows, width]
  Buffer<T> grad_keys, grad_values;  // [key_stride, width]

  explicit BackwardScratch(const Problem<T>& p)
      : block(p),
        keys_t(p.head_dim * block.key_stride),
        values_t(p.head_dim * block.key_stride),
        grad_out(block.key_stride * p.width),
        scores(block.tile_rows * block.columns),
        grad_scores(block.tile_rows * block.columns),
        grad_queries(block.tile_rows * p.width),
        grad_keys(block.key_stride * p.width),
        grad_values(block.key_stride * p.width) {}
};

// Recomputes a tile's weights from lse; writes the queries' gradients, adds to those of keys and
// values.
template <typename T>
REFORMER_CLONES void differentiate(BackwardScratch<T>& scratch,
                                   const typename Gathered<T>::Tile& tile, const T* lse,
                                   const T* delta, const uint8_t* silent) {
  Gathered<T>& block = scratch.block;
  const Problem<T>& p = block.p;
  const int64_t width = p.width, columns = block.columns, depth = pad_to_lanes<T>(p.head_dim);
  const T* queries = block.queries() + tile.begin * width;
  const T* grad_out = scratch.grad_out.get() + tile.begin * width;
  T *scores = scratch.scores.get(), *grads = scratch.grad_scores.get();
  multiply(queries, width, 1, scratch.keys_t.get() + tile.first_key, block.key_stride, scores,
           columns, tile.n, tile.keys.columns, p.head_dim, false);
  multiply(grad_out, width, 1, scratch.values_t.get() + tile.first_key, block.key_stride, grads,
           columns, tile.n, tile.keys.columns, p.head_dim, false);
  for (int64_t i = 0; i < tile.n; ++i) {
    const Query<T> query = block.query(tile.begin + i);
    if (silent[query.position]) {
      std::fill_n(scores + i * columns, tile.keys.columns, T(0));
      std::fill_n(grads + i * columns, tile.keys.columns, T(0));
      continue;
    }
    differentiate_row(tile.keys, query, lse[query.position], delta[query.position],
                      scores + i * columns, grads + i * columns);
  }
  multiply(grads, columns, 1, block.keys() + tile.first_key * width, width,
           scratch.grad_queries.get(), width, tile.n, depth, tile.n_keys, false);
  multiply(grads, 1, columns, queries, width, scratch.grad_keys.get() + tile.first_key * width,
           width, tile.n_keys, depth, tile.n, true);
  multiply(scores, 1, columns, grad_out, width, scratch.grad_values.get() + tile.first_key * width,
           width, tile.n_keys, depth, tile.n, true);
}

template <typename T>
void backward(const ChunkedAttentionArgs& args, const ChunkedAttentionResults& results,
              const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  const Problem<T> p(args);
  const int64_t heads = p.batch * p.heads;
  const Rows out(results.out), grad_out(results.grad_out);
  const Rows grad_q_rows(grad_q), grad_v_rows(grad_v);
  const Rows grad_k_rows = p.shared_qk ? Rows() : Rows(grad_k);
  const at::Tensor lse = results.lse.contiguous();
  const at::Tensor grad_lse = results.grad_lse ? results.grad_lse->contiguous() : at::Tensor();
  const T* lse_data = lse.template const_data_ptr<T>();
  const Buffer<T> delta(lse.numel());
  const Buffer<uint8_t> silent(lse.numel());
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const auto clear = [&](const Rows& rows) {
        for (int64_t i = 0; i < p.length; ++i) {
          std::fill_n(rows.head<T>(head) + i * rows.stride(), p.head_dim, T(0));
        }
      };
      clear(grad_q_rows);
      if (!p.shared_qk) clear(grad_k_rows);
      clear(grad_v_rows);
      const T* head_grad_lse =
          grad_lse.defined() ? grad_lse.template const_data_ptr<T>() + head * p.length : nullptr;
      visit_head<T>(out, head, [&](const auto* rows) {
        begin_gradients(
            rows, out.stride(), grad_out.head<std::remove_reference_t<decltype(*rows)>>(head),
            grad_out.stride(), p.length, p.head_dim, p.mask_self && !args.own_values.has_value(),
            lse_data + head * p.length, head_grad_lse, delta.get() + head * p.length,
            silent.get() + head * p.length, grad_v_rows.head<T>(head), grad_v_rows.stride());
      });
      if (p.shared_qk && p.padding.defined()) {  // padding is no query then, nor its cotangent one
        visit_head<T>(grad_out, head, [&](const auto* rows) {
          for (int64_t i = 0; i < p.length; ++i) {
            silent.get()[head * p.length + i] |=
                p.is_padding(head, i) && !is_finite<T>(rows + i * grad_out.stride(), p.head_dim);
          }
        });
      }
    }
  });

  for_each_block(heads, backward_phases(p.line), [&] {
    return [&, scratch = BackwardScratch<T>(p)](int64_t head, const Block& b) mutable {
      Gathered<T>& block = scratch.block;
      T *grad_keys = scratch.grad_keys.get(), *grad_values = scratch.grad_values.get();
      block.read(head, b);
      const int64_t padded = block.padded_rows();
      transpose(block.keys(), p.width, padded, p.head_dim, scratch.keys_t.get(), block.key_stride);
      block.gather_values(grad_values);
      transpose(grad_values, p.width, padded, p.head_dim, scratch.values_t.get(), block.key_stride);
      gather(grad_out, head, p.head_dim, block.query_positions(), b.count * p.line.chunk,
             scratch.grad_out.get(), p.width);
      const uint8_t* head_silent = silent.get() + head * p.length;
      block.clear_queries(head_silent, scratch.grad_out.get());
      if (!p.shared_qk) block.clear_queries(head_silent, block.separate_queries());
      std::fill_n(grad_keys, block.rows * p.width, T(0));
      std::fill_n(grad_values, block.rows * p.width, T(0));
      block.for_each_tile([&](const typename Gathered<T>::Tile& tile) {
        differentiate(scratch, tile, lse_data + head * p.length, delta.get() + head * p.length,
                      head_silent);
        scatter_add(scratch.grad_queries.get(), p.width, block.query_positions() + tile.begin,
                    tile.n, grad_q_rows.head<T>(head), grad_q_rows.stride(), p.head_dim);
      });
      if (p.shared_qk) {
        project(block.keys(), p.width, block.positions(), block.rows,
                p.inverse_norm.get() + head * p.length, p.clamped_inverse(head), p.head_dim,
                grad_keys);
      }
      const Rows& grad_key_rows = p.shared_qk ? grad_q_rows : grad_k_rows;
      scatter_add(grad_keys, p.width, block.positions(), block.rows, grad_key_rows.head<T>(head),
                  grad_key_rows.stride(), p.head_dim);
      scatter_add(grad_values, p.width, block.positions(), block.rows, grad_v_rows.head<T>(head),
                  grad_v_rows.stride(), p.head_dim);
    };
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_backward_cpu(
    const ChunkedAttentionArgs& args, const ChunkedAttentionResults& results) {
  const auto [grad_q, grad_k, grad_v] = chunked_attention_grads(args);
  if (grad_q.numel() == 0) return {grad_q, grad_k, grad_v};
  const at::Tensor computed_q = computing(grad_q), computed_v = computing(grad_v);
  const at::Tensor computed_k = args.shared_qk() ? grad_k : computing(grad_k);
  if (results.lse.scalar_type() == at::kDouble) {
    backward<double>(args, results, computed_q, computed_k, computed_v);
  } else {
    backward<float>(args, results, computed_q, computed_k, computed_v);
  }
  finish(grad_q, computed_q);
  finish(grad_k, computed_k);
  finish(grad_v, computed_v);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) {
  m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<chunked_attention_cpu>));
  m.impl("chunked_attention_backward",
         TORCH_FN(chunked_attention_backward_entry<chunked_attention_backward_cpu>));
}

}  // namespace reformer

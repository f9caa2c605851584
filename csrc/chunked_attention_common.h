// chunked_attention: what its CPU, CUDA and Meta kernels share. A kernel is a function of the
// resolved arguments; chunked_attention_entry<kernel> is what the dispatcher registers:
//   m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<kernel>));
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "attention_options.h"

namespace reformer {

// The lse of a query whose only valid key is itself under mask_self (its output is then v_i, or
// that of own_values). It marks these queries: no other lse is stored with this value, see
// stored_lse.
inline constexpr double kSelfOnlyLse = -1e5;

// An lse that may happen to be that value, as stored: then one unit in the last place above it.
template <typename T>
T stored_lse(T lse) {
  return lse == static_cast<T>(kSelfOnlyLse) ? std::nextafter(lse, T(0)) : lse;
}

// Raises unless the scale of logits, if given, is finite in the type that q is computed with in.
void check_scale(const char* op, std::optional<double> scale, const at::Tensor& q);

// The arguments of chunked_attention: tensors and options.
struct ChunkedAttentionArgs : ChunkedAttentionOptions {
  at::Tensor q, v;                  // [B, H, L, D], any strides
  std::optional<at::Tensor> k;      // the same; none: shared QK
  std::optional<at::Tensor> order;  // int32 [B, H, R, L]; none: one round in natural order

  // Raises unless all are as reformer.h says (but for the values of order, buckets and seed), and
  // sets mask_self and wrap to their defaults if they have no value. Runs under tracing too. Done
  // once a call, for the kernels: what stands before them passes on what was given.
  void resolve();

  // Puts next_values in place of v, and v in place of own_values, if there is a value_mix; then
  // there is none.
  void mix_values();

  bool shared_qk() const { return !k.has_value(); }
  // Of concrete tensors only; under tracing sizes are symbols.
  int64_t batch() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t length() const { return q.size(2); }
  int64_t head_dim() const { return q.size(3); }
  int64_t rounds() const { return order.has_value() ? order->size(2) : 1; }
  double resolved_scale() const {
    return scale.value_or(std::pow(static_cast<double>(head_dim()), -0.5));
  }
};

// What the backward needs besides the arguments.
struct ChunkedAttentionResults {
  at::Tensor grad_out;                 // [B, H, L, D], any strides, also expanded from one zero
  std::optional<at::Tensor> grad_lse;  // [B, H, L] of lse's dtype; none: zero
  at::Tensor out, lse;                 // of the forward

  void check(const ChunkedAttentionArgs& args) const;
};

// Uninitialised results. [B, H, L, D], dense, last dimension contiguous, rows in the order of q's
// memory: contiguous, or a transposed (B, L, H, D). Also for the gradient of q, k or v, like each.
at::Tensor chunked_attention_output(const at::Tensor& q);
// [B, H, L] contiguous, float32 (float64 for float64).
at::Tensor chunked_attention_lse(const at::Tensor& q);
// Like q, k and v; that of k has shape [0] for shared QK.
std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_grads(
    const ChunkedAttentionArgs& args);

using ChunkedAttentionForward = std::tuple<at::Tensor, at::Tensor>(const ChunkedAttentionArgs&);
using ChunkedAttentionBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const ChunkedAttentionArgs&, const ChunkedAttentionResults&);

template <ChunkedAttentionForward* kernel>
std::tuple<at::Tensor, at::Tensor> chunked_attention_resolved(
    const ChunkedAttentionOptions& options, const at::Tensor& q, const std::optional<at::Tensor>& k,
    const at::Tensor& v, const std::optional<at::Tensor>& order) {
  ChunkedAttentionArgs args{options, q, v, k, order};
  args.mix_values();
  args.resolve();
  return kernel(args);
}

template <ChunkedAttentionBackward* kernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_backward_resolved(
    const ChunkedAttentionOptions& options, const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
    const std::optional<at::Tensor>& k, const at::Tensor& v, const std::optional<at::Tensor>& order,
    const at::Tensor& out, const at::Tensor& lse) {
  ChunkedAttentionArgs args{options, q, v, k, order};
  args.resolve();
  const ChunkedAttentionResults results{grad_out, grad_lse, out, lse};
  results.check(args);
  return kernel(args, results);
}

// -> out, lse
template <ChunkedAttentionForward* kernel>
inline constexpr auto* chunked_attention_entry =
    spread_options<ChunkedAttentionOptions, chunked_attention_resolved<kernel>>;

// -> grad_q, grad_k, grad_v
template <ChunkedAttentionBackward* kernel>
inline constexpr auto* chunked_attention_backward_entry =
    spread_options<ChunkedAttentionOptions, chunked_attention_backward_resolved<kernel>>;

}  // namespace reformer

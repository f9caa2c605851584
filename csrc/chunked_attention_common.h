// chunked_attention: what its CPU, CUDA and Meta kernels share. A kernel is a function of the
// checked arguments; chunked_attention_entry<kernel> is what the dispatcher registers:
//   m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<kernel>));
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

namespace reformer {

// The lse of a query whose only valid key is itself under mask_self (its output is then v_i).
inline constexpr double kSelfOnlyLse = -1e5;

// The arguments of chunked_attention, checked and with their defaults resolved.
struct ChunkedAttentionArgs {
  at::Tensor q, v;              // [B, H, L, D], any strides
  at::Tensor k;                 // the same; undefined: shared QK
  at::Tensor order;             // int32 [B, H, R, L]; undefined: one round in natural order
  at::Tensor key_padding_mask;  // bool [B, L], true = padding; undefined: none
  at::Tensor buckets;           // int32 [B, H, R, L]; undefined: all pairs of a window may attend
  at::Tensor dropout_seed;      // int64, one element; defined iff dropout_p > 0
  int64_t chunk_size, look_back, look_ahead;
  bool causal, mask_self, wrap, correct_duplicates;
  std::optional<double> scale_given;
  double dropout_p;

  bool shared_qk() const { return !k.defined(); }
  // Of concrete tensors only; under tracing sizes are symbols.
  int64_t batch() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t length() const { return q.size(2); }
  int64_t head_dim() const { return q.size(3); }
  int64_t rounds() const { return order.defined() ? order.size(2) : 1; }
  double scale() const {
    return scale_given.value_or(std::pow(static_cast<double>(head_dim()), -0.5));
  }
};

// What the backward needs besides the arguments.
struct ChunkedAttentionResults {
  at::Tensor out, lse;  // of the forward
  at::Tensor grad_out;  // [B, H, L, D], any strides, also expanded from one zero
  at::Tensor grad_lse;  // [B, H, L] of lse's dtype; undefined: zero
};

// Raises unless the arguments are as reformer.h says (but for the values of order, buckets and
// seed). Runs under tracing too.
ChunkedAttentionArgs check_chunked_attention(
    const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
    const std::optional<at::Tensor>& order, int64_t chunk_size, int64_t look_back,
    int64_t look_ahead, bool causal, std::optional<bool> mask_self, std::optional<bool> wrap,
    std::optional<double> scale, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& buckets, bool correct_duplicates, double dropout_p,
    const std::optional<at::Tensor>& dropout_seed);

ChunkedAttentionResults check_chunked_attention_results(const ChunkedAttentionArgs& args,
                                                        const at::Tensor& grad_out,
                                                        const std::optional<at::Tensor>& grad_lse,
                                                        const at::Tensor& out,
                                                        const at::Tensor& lse);

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

// -> out, lse
template <ChunkedAttentionForward* kernel>
std::tuple<at::Tensor, at::Tensor> chunked_attention_entry(
    const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
    const std::optional<at::Tensor>& order, int64_t chunk_size, int64_t look_back,
    int64_t look_ahead, bool causal, std::optional<bool> mask_self, std::optional<bool> wrap,
    std::optional<double> scale, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& buckets, bool correct_duplicates, double dropout_p,
    const std::optional<at::Tensor>& dropout_seed) {
  return kernel(check_chunked_attention(q, k, v, order, chunk_size, look_back, look_ahead, causal,
                                        mask_self, wrap, scale, key_padding_mask, buckets,
                                        correct_duplicates, dropout_p, dropout_seed));
}

// -> grad_q, grad_k, grad_v
template <ChunkedAttentionBackward* kernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_backward_entry(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
    const std::optional<at::Tensor>& k, const at::Tensor& v, const std::optional<at::Tensor>& order,
    const at::Tensor& out, const at::Tensor& lse, int64_t chunk_size, int64_t look_back,
    int64_t look_ahead, bool causal, std::optional<bool> mask_self, std::optional<bool> wrap,
    std::optional<double> scale, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& buckets, bool correct_duplicates, double dropout_p,
    const std::optional<at::Tensor>& dropout_seed) {
  const ChunkedAttentionArgs args = check_chunked_attention(
      q, k, v, order, chunk_size, look_back, look_ahead, causal, mask_self, wrap, scale,
      key_padding_mask, buckets, correct_duplicates, dropout_p, dropout_seed);
  return kernel(args, check_chunked_attention_results(args, grad_out, grad_lse, out, lse));
}

}  // namespace reformer

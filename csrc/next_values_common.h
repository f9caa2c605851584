// next_values: what its CPU, CUDA and Meta kernels share.
//
// w_j = self v_j + next v_{j+1} + previous v_{j-1}, where a neighbour that does not exist or is
// padding is v_j itself, and w is zero at padding. With `centre(j)` the sum of what falls to v_j,
//   w_j      = centre(j) v_j      + next v_{j+1} + previous v_{j-1}   (of the neighbours there are)
//   grad_v_j = centre(j) grad_w_j + previous grad_w_{j+1} + next grad_w_{j-1}:
// the same sum of neighbours in both directions.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace reformer {

// Raise unless the arguments are as reformer.h says. Run under tracing too.
void check_next_values(const at::Tensor& v, const at::Tensor& value_mix,
                       const std::optional<at::Tensor>& key_padding_mask, bool causal);
void check_next_values_backward(const at::Tensor& grad, const at::Tensor& v,
                                const at::Tensor& value_mix,
                                const std::optional<at::Tensor>& key_padding_mask, bool causal,
                                const std::optional<at::Tensor>& own_grad,
                                const std::optional<at::Tensor>& lse);

// The gradients of v and value_mix, through the dispatcher. own_grad [B, H, L, D] is added to that
// of v where lse [B, H, L], of an attention, is kSelfOnlyLse.
std::tuple<at::Tensor, at::Tensor> next_values_backward(
    const at::Tensor& grad, const at::Tensor& v, const at::Tensor& value_mix,
    const std::optional<at::Tensor>& key_padding_mask, bool causal,
    const std::optional<at::Tensor>& own_grad = {}, const std::optional<at::Tensor>& lse = {});

// value_mix in the type that is computed in, contiguous: float32, float64 for float64.
at::Tensor wide_value_mix(const at::Tensor& v, const at::Tensor& value_mix);

}  // namespace reformer

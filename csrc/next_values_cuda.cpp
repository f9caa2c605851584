// next_values on CUDA: readies the tensors for the kernels, launches, registers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "chunked_attention_common.h"
#include "kernel_tensors.h"
#include "kernels/next_values.h"
#include "next_values_common.h"

namespace reformer {
namespace {

kernels::ValueRows rows_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Everything but the results. Keeps no tensor alive: they must outlive the launch.
void fill(kernels::NextValuesParams& params, const at::Tensor& v, const at::Tensor& value_mix,
          const at::Tensor& mask, bool causal) {
  params.v = rows_of(v);
  params.value_mix = value_mix.const_data_ptr<float>();
  params.key_padding_mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  params.dtype = kernel_dtype(v).value();
  params.batch = v.size(0);
  params.heads = v.size(1);
  params.length = v.size(2);
  params.head_dim = v.size(3);
  params.causal = causal;
}

at::Tensor contiguous(const std::optional<at::Tensor>& mask) {
  return mask.has_value() ? mask->contiguous() : at::Tensor();
}

at::Tensor next_values_cuda(const at::Tensor& v_given, const at::Tensor& value_mix,
                            const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  const c10::cuda::CUDAGuard guard(v_given.device());
  check_next_values(v_given, value_mix, key_padding_mask, causal);
  const at::Tensor out = chunked_attention_output(v_given);
  if (out.numel() == 0) return out;
  const at::Tensor v = with_aligned_rows(v_given), mix = wide_value_mix(v, value_mix);
  const at::Tensor mask = contiguous(key_padding_mask);
  kernels::NextValuesParams params = {};
  fill(params, v, mix, mask, causal);
  params.out = rows_of(out);
  C10_CUDA_CHECK(kernels::next_values_forward(params, c10::cuda::getCurrentCUDAStream().stream()));
  return out;
}

std::tuple<at::Tensor, at::Tensor> next_values_backward_cuda(
    const at::Tensor& grad_given, const at::Tensor& v_given, const at::Tensor& value_mix,
    const std::optional<at::Tensor>& key_padding_mask, bool causal,
    const std::optional<at::Tensor>& own_grad_given, const std::optional<at::Tensor>& lse_given) {
  const c10::cuda::CUDAGuard guard(v_given.device());
  check_next_values_backward(grad_given, v_given, value_mix, key_padding_mask, causal,
                             own_grad_given, lse_given);
  const at::Tensor grad_v = chunked_attention_output(v_given);
  const at::Tensor mix = wide_value_mix(v_given, value_mix);
  const at::Tensor grad_mix = at::empty(mix.sizes(), mix.options());
  if (grad_v.numel() == 0) return {grad_v, grad_mix.zero_().to(value_mix.scalar_type())};
  const at::Tensor v = with_aligned_rows(v_given), grad = with_aligned_rows(grad_given);
  const at::Tensor mask = contiguous(key_padding_mask);
  kernels::NextValuesBackwardParams params = {};
  fill(params, v, mix, mask, causal);
  params.grad = rows_of(grad);
  params.grad_v = rows_of(grad_v);
  at::Tensor own_grad, lse;
  if (lse_given.has_value()) {
    own_grad = with_aligned_rows(*own_grad_given);
    lse = lse_given->contiguous();
    params.own_grad = rows_of(own_grad);
    params.lse = lse.const_data_ptr<float>();
    params.self_only_lse = static_cast<float>(kSelfOnlyLse);
  }
  params.grad_value_mix = grad_mix.mutable_data_ptr<float>();
  const at::Tensor workspace = at::empty({kernels::next_values_backward_workspace(params)},
                                         grad_v.options().dtype(at::kByte));
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  C10_CUDA_CHECK(kernels::next_values_backward(params, c10::cuda::getCurrentCUDAStream().stream()));
  return {grad_v, grad_mix.to(value_mix.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) {
  m.impl("next_values", &next_values_cuda);
  m.impl("next_values_backward", &next_values_backward_cuda);
}

}  // namespace reformer

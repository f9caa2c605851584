// apply_rotary on CUDA: readies the tensors for the kernel, which split_heads and merge_heads use
// too, launches, registers.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "apply_rotary_common.h"
#include "kernel_tensors.h"
#include "kernels/apply_rotary.h"

namespace reformer {
namespace {

kernels::RotaryRows rows_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

at::Tensor apply_rotary_cuda(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_apply_rotary(x, cos, sin);
  const at::Tensor out = at::empty_like(x);
  const auto heads = [](const at::Tensor& x) {
    return x.dim() == 5 ? x.unbind() : std::vector<at::Tensor>{x};
  };
  const auto from = heads(x);
  const bool done = turn_heads_cuda(from, heads(out), static_cast<int64_t>(from.size()), cos, sin);
  return done ? out : apply_rotary_composite(x, cos, sin);
}

}  // namespace

bool turn_heads_cuda(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to,
                     int64_t turned, const at::Tensor& cos, const at::Tensor& sin) {
  kernels::ApplyRotaryParams params = {};
  if (from.empty() || from.size() > std::size(params.from)) return false;
  const at::Tensor& x = from[0];
  const auto dtype = kernel_dtype(x);
  bool fits = dtype.has_value() && x.size(-1) / 2 * x.element_size() % 16 == 0 &&
              has_aligned_rows(cos) && has_aligned_rows(sin);
  for (size_t part = 0; part < from.size(); ++part) {
    fits = fits && has_aligned_rows(from[part]) && has_aligned_rows(to[part]);
    params.from[part] = rows_of(from[part]);
    params.to[part] = rows_of(to[part]);
  }
  if (!fits) return false;
  params.cos = cos.const_data_ptr<float>();
  params.sin = sin.const_data_ptr<float>();
  params.cos_stride_b = cos.dim() == 4 ? cos.stride(0) : 0;
  params.sin_stride_b = sin.dim() == 4 ? sin.stride(0) : 0;
  params.cos_stride_l = cos.stride(-2);
  params.sin_stride_l = sin.stride(-2);
  params.dtype = *dtype;
  params.parts = static_cast<int64_t>(from.size());
  params.turned = turned;
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.length = x.size(2);
  params.head_dim = x.size(3);
  C10_CUDA_CHECK(kernels::apply_rotary(params, c10::cuda::getCurrentCUDAStream().stream()));
  return true;
}

TORCH_LIBRARY_IMPL(reformer, CUDA, m) { m.impl("apply_rotary", &apply_rotary_cuda); }

}  // namespace reformer

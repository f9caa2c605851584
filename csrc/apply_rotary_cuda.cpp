// apply_rotary on CUDA: readies the tensors for the kernel, launches, registers.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "apply_rotary_common.h"
#include "kernel_dtype.h"
#include "kernels/apply_rotary.h"

namespace reformer {
namespace {

// Whether all rows begin at multiples of 16 bytes, with nothing between their elements.
bool has_aligned_rows(const at::Tensor& x) {
  bool aligned = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) {
    aligned &= x.size(dim) == 1 || x.stride(dim) * x.element_size() % 16 == 0;
  }
  return aligned;
}

kernels::RotaryRows rows_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 5 ? x.stride(0) : 0, x.stride(-4), x.stride(-3),
          x.stride(-2)};
}

at::Tensor apply_rotary_cuda(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_apply_rotary(x, cos, sin);
  const auto dtype = kernel_dtype(x);
  const at::Tensor out = at::empty_like(x);
  const bool fits = x.size(-1) / 2 * x.element_size() % 16 == 0 && has_aligned_rows(x) &&
                    has_aligned_rows(out) && has_aligned_rows(cos) && has_aligned_rows(sin);
  if (!dtype.has_value() || !fits) return apply_rotary_composite(x, cos, sin);
  kernels::ApplyRotaryParams params = {};
  params.x = rows_of(x);
  params.out = rows_of(out);
  params.cos = cos.const_data_ptr<float>();
  params.sin = sin.const_data_ptr<float>();
  params.cos_stride_b = cos.dim() == 4 ? cos.stride(0) : 0;
  params.sin_stride_b = sin.dim() == 4 ? sin.stride(0) : 0;
  params.cos_stride_l = cos.stride(-2);
  params.sin_stride_l = sin.stride(-2);
  params.dtype = *dtype;
  params.parts = x.dim() == 5 ? x.size(0) : 1;
  params.batch = x.size(-4);
  params.heads = x.size(-3);
  params.length = x.size(-2);
  params.head_dim = x.size(-1);
  C10_CUDA_CHECK(kernels::apply_rotary(params, c10::cuda::getCurrentCUDAStream().stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) { m.impl("apply_rotary", &apply_rotary_cuda); }

}  // namespace reformer

// From torch's tensors to what the CUDA kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/common/dtype.h"

namespace reformer {

// float64 and others: none.
inline std::optional<kernels::DType> kernel_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kernels::DType::f32;
    case at::kHalf:
      return kernels::DType::f16;
    case at::kBFloat16:
      return kernels::DType::bf16;
    default:
      return std::nullopt;
  }
}

// Whether all rows, of the last dimension, are contiguous and begin at multiples of 16 bytes.
inline bool has_aligned_rows(const at::Tensor& x) {
  bool aligned = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) {
    aligned &= x.size(dim) == 1 || x.stride(dim) * x.element_size() % 16 == 0;
  }
  return aligned;
}

// x itself, or a copy that has them.
inline at::Tensor with_aligned_rows(const at::Tensor& x) {
  return has_aligned_rows(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

}  // namespace reformer

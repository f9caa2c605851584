// From torch's dtypes to the CUDA kernels'.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/dtype.h"

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

}  // namespace reformer

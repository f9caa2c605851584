// apply_rotary: what its CUDA and composite kernels share.
#pragma once

#include <ATen/core/Tensor.h>

namespace reformer {

// Raises unless the arguments are as reformer.h says. Runs under tracing too.
void check_apply_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// The operator by ATen operators, for any device, dtype, D and alignment.
at::Tensor apply_rotary_composite(const at::Tensor& x, const at::Tensor& cos,
                                  const at::Tensor& sin);

}  // namespace reformer

// apply_rotary: what its CUDA and composite kernels share, also with split_heads and merge_heads.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace reformer {

// Raises unless the arguments are as reformer.h says. Runs under tracing too.
void check_apply_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// Raises unless cos and sin suit x of that size. Runs under tracing too.
void check_rotary_factors(const char* op, const at::Tensor& cos, const at::Tensor& sin,
                          const at::Tensor& x, const c10::SymInt& batch, const c10::SymInt& length,
                          const c10::SymInt& head_dim);

// The operator by ATen operators, for any device, dtype, D and alignment.
at::Tensor apply_rotary_composite(const at::Tensor& x, const at::Tensor& cos,
                                  const at::Tensor& sin);

// The same, written to `to`.
void turn_heads_composite(const at::Tensor& from, const at::Tensor& to, const at::Tensor& cos,
                          const at::Tensor& sin);

// On CUDA: writes the heads [B, H, L, D] of `from`, the first `turned` of them turned, to `to`.
// False, and nothing is written, where the kernel does not take them.
bool turn_heads_cuda(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to,
                     int64_t turned, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace reformer

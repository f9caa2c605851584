// split_heads and merge_heads: what their CUDA and composite kernels share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace reformer {

// Raise unless the arguments are as reformer.h says. Run under tracing too.
void check_split_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                       const at::Tensor& sin);
void check_merge_heads(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
                       const at::Tensor& cos, const at::Tensor& sin);

// Uninitialised results: heads [B, H, L, D] in the memory order (B, L, H, D), as a projection has
// them, and the projection [B, L, parts * H * D].
std::vector<at::Tensor> heads_like(const at::Tensor& x, int64_t parts, const at::Tensor& cos);
at::Tensor projection_like(const at::Tensor& v, int64_t parts);

// A projection as [parts, B, H, L, D], a view.
at::Tensor view_as_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos);

// The operators by ATen operators, for any device, dtype, D and alignment.
std::vector<at::Tensor> split_heads_composite(const at::Tensor& x, int64_t parts,
                                              const at::Tensor& cos, const at::Tensor& sin);
at::Tensor merge_heads_composite(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                 const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace reformer

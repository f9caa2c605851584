// split_heads and merge_heads on CUDA: ready the tensors for the kernel, launch, register.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "apply_rotary_common.h"
#include "split_heads_common.h"

namespace reformer {
namespace {

std::vector<at::Tensor> split_heads_cuda(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                                         const at::Tensor& sin) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_split_heads(x, parts, cos, sin);
  const std::vector<at::Tensor> out = heads_like(x, parts, cos);
  const bool done =
      turn_heads_cuda(view_as_heads(x, parts, cos).unbind(), out, parts - 1, cos, sin);
  return done ? out : split_heads_composite(x, parts, cos, sin);
}

at::Tensor merge_heads_cuda(const at::Tensor& q, const std::optional<at::Tensor>& k,
                            const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin) {
  const c10::cuda::CUDAGuard guard(q.device());
  check_merge_heads(q, k, v, cos, sin);
  std::vector<at::Tensor> heads = {q, v};
  if (k.has_value()) heads.insert(heads.begin() + 1, *k);
  const auto parts = static_cast<int64_t>(heads.size());
  const at::Tensor out = projection_like(v, parts);
  const bool done =
      turn_heads_cuda(heads, view_as_heads(out, parts, cos).unbind(), parts - 1, cos, sin);
  return done ? out : merge_heads_composite(q, k, v, cos, sin);
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) {
  m.impl("split_heads", &split_heads_cuda);
  m.impl("merge_heads", &merge_heads_cuda);
}

}  // namespace reformer

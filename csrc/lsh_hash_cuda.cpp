// lsh_hash on CUDA: readies the tensors for the kernels, launches, registers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "kernel_tensors.h"
#include "kernels/lsh_hash.h"
#include "lsh_hash_common.h"

namespace reformer {
namespace {

kernels::DType checked_dtype(const char* name, const at::Tensor& x) {
  const auto dtype = kernel_dtype(x);
  REFORMER_CHECK(dtype.has_value(), "lsh_hash: expected ", name,
                 " of dtype float32, float16 or bfloat16 on CUDA, got ", x.scalar_type());
  return *dtype;
}

// A dimension of one element may have any stride: a zero keeps it from hiding that rows are
// aligned.
int64_t stride_of(const at::Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

at::Tensor lsh_hash_cuda(const at::Tensor& x_given, const at::Tensor& rotations_given,
                         at::IntArrayRef n_buckets,
                         const std::optional<at::Tensor>& key_padding_mask) {
  const c10::cuda::CUDAGuard guard(x_given.device());
  check_lsh_hash(x_given, rotations_given, n_buckets, key_padding_mask);
  kernels::LshHashParams params = {};
  params.x_dtype = checked_dtype("x", x_given);
  params.rotations_dtype = checked_dtype("rotations", rotations_given);
  at::Tensor buckets = lsh_hash_output(x_given, rotations_given);
  if (buckets.numel() == 0) return buckets;

  const at::Tensor x =
      x_given.stride(3) == 1 || x_given.size(3) == 1 ? x_given : x_given.contiguous();
  const at::Tensor rotations = rotations_given.contiguous();
  const at::Tensor mask =
      key_padding_mask.has_value() ? key_padding_mask->contiguous() : at::Tensor();
  params.x = x.const_data_ptr();
  params.x_stride_b = stride_of(x, 0);
  params.x_stride_h = stride_of(x, 1);
  params.x_stride_l = stride_of(x, 2);
  params.rotations = rotations.const_data_ptr();
  params.rotation_heads = rotations.size(0);
  params.key_padding_mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  params.buckets = buckets.mutable_data_ptr<int32_t>();
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.length = x.size(2);
  params.head_dim = x.size(3);
  params.rounds = rotations.size(2);
  params.n_factors = static_cast<int>(n_buckets.size());
  for (size_t f = 0; f < n_buckets.size(); ++f) {
    params.factors[f] = static_cast<int32_t>(n_buckets[f]);
  }
  const at::Tensor workspace =
      at::empty({kernels::lsh_hash_workspace(params)}, x.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(kernels::lsh_hash(params, c10::cuda::getCurrentCUDAStream().stream()));
  return buckets;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) { m.impl("lsh_hash", &lsh_hash_cuda); }

}  // namespace reformer

// bucket_sort on CUDA: readies the tensors for the kernels, launches, registers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "bucket_sort_common.h"
#include "kernels/bucket_sort.h"

namespace reformer {
namespace {

at::Tensor bucket_sort_cuda(const at::Tensor& buckets_given, int64_t n_buckets) {
  const c10::cuda::CUDAGuard guard(buckets_given.device());
  check_bucket_sort(buckets_given, n_buckets);
  at::Tensor order = bucket_sort_output(buckets_given);
  if (order.numel() == 0) return order;

  const at::Tensor buckets = buckets_given.contiguous();
  kernels::BucketSortParams params = {};
  params.buckets = buckets.const_data_ptr<int32_t>();
  params.order = order.mutable_data_ptr<int32_t>();
  params.length = buckets.size(3);
  params.segments = buckets.numel() / params.length;
  params.n_buckets = n_buckets;
  const at::Tensor workspace =
      at::empty({kernels::bucket_sort_workspace(params)}, buckets.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(kernels::bucket_sort(params, c10::cuda::getCurrentCUDAStream().stream()));
  return order;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) { m.impl("bucket_sort", &bucket_sort_cuda); }

}  // namespace reformer

// bucket_sort: what its CPU, CUDA and Meta kernels share.
#pragma once

#include <ATen/core/Tensor.h>

namespace reformer {

// Raises unless the arguments are as reformer.h says (but for the values). Runs under tracing too.
void check_bucket_sort(const at::Tensor& buckets, int64_t n_buckets);

// The uninitialised result: int32 [B, H, R, L], contiguous.
at::Tensor bucket_sort_output(const at::Tensor& buckets);

}  // namespace reformer

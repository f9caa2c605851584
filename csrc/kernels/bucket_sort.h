// Stable counting sort of each segment's positions by bucket.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bucket_sort/params.h"

namespace reformer::kernels {

// Bytes of scratch that bucket_sort needs for these sizes (0 when it needs none).
int64_t bucket_sort_workspace(const BucketSortParams& params);

// Enqueues; never synchronises or allocates. Deterministic.
cudaError_t bucket_sort(const BucketSortParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

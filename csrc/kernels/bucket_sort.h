// Stable counting sort of each segment's positions by bucket.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace reformer::kernels {

struct BucketSortParams {
  const int32_t* buckets;  // [segments, length]; values outside [0, n_buckets) are clamped into it
  int32_t* order;          // [segments, length], out: positions by (bucket, position)
  void* workspace;         // bucket_sort_workspace(...) bytes, 256-byte aligned
  int64_t segments, length, n_buckets;
};

// Bytes of scratch that bucket_sort needs for these sizes (0 when it needs none).
int64_t bucket_sort_workspace(const BucketSortParams& params);

// Enqueues; never synchronises or allocates. Deterministic.
cudaError_t bucket_sort(const BucketSortParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

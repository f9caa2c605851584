// The arguments of the sort. No CUDA here.
#pragma once

#include <cstdint>

namespace reformer::kernels {

struct BucketSortParams {
  const int32_t* buckets;  // [segments, length]; values outside [0, n_buckets) are clamped into it
  int32_t* order;          // [segments, length], out: positions by (bucket, position)
  void* workspace;         // bucket_sort_workspace(...) bytes, 256-byte aligned
  int64_t segments, length, n_buckets;
};

}  // namespace reformer::kernels

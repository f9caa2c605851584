// Rotary position embeddings: turns the pairs (x[d], x[d + D/2]) of every row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace reformer::kernels {

// Rows [B, H, L] of D elements, contiguous; strides in elements.
struct RotaryRows {
  const void* data;
  int64_t stride_b, stride_h, stride_l;
};

// All rows aligned to 16 bytes, D/2 elements of `from` a multiple of that.
struct ApplyRotaryParams {
  RotaryRows from[3], to[3];  // of each part
  const float *cos, *sin;     // [B or 1, L, D], last dimension contiguous
  int64_t cos_stride_b, cos_stride_l, sin_stride_b, sin_stride_l;  // stride_b 0: for all
  DType dtype;
  int64_t parts, turned;  // the others are copied
  int64_t batch, heads, length, head_dim;
};

// Enqueues; never synchronises or allocates.
cudaError_t apply_rotary(const ApplyRotaryParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

// Values that say what comes next: w_j = own v_j + next v_{j+1} + previous v_{j-1}. A neighbour
// that does not exist or is padding is v_j itself; w is zero at padding.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace reformer::kernels {

// Rows [B, H, L] of D elements, contiguous and aligned to 16 bytes; strides in elements.
struct ValueRows {
  const void* data;
  int64_t stride_b, stride_h, stride_l;
};

struct NextValuesParams {
  ValueRows v;
  ValueRows out;                 // written by the forward pass
  const float* value_mix;        // causal: [own, next][H]; else [previous, own, next][H]
  const bool* key_padding_mask;  // [B, L] contiguous, true = padding; null: none
  DType dtype;
  int64_t batch, heads, length, head_dim;
  bool causal;
};

struct NextValuesBackwardParams : NextValuesParams {  // without out
  ValueRows grad;
  ValueRows grad_v;    // written
  const float* lse;    // [B, H, L]; null: no own_grad
  ValueRows own_grad;  // added to grad_v where lse is self_only_lse
  float self_only_lse;
  float* grad_value_mix;  // [2 or 3][H], written
  float* workspace;       // next_values_backward_workspace(...) bytes
};

int64_t next_values_backward_workspace(const NextValuesBackwardParams& params);

// Enqueue; never synchronise or allocate. Deterministic: no atomics. D a multiple of 8, at most
// 256.
cudaError_t next_values_forward(const NextValuesParams& params, cudaStream_t stream);
cudaError_t next_values_backward(const NextValuesBackwardParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

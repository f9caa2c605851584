// The arguments of the hash. No CUDA here.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace reformer::kernels {

inline constexpr int kMaxHashFactors = 8;

struct LshHashParams {
  const void* x;  // [B, H, L, D], last dimension contiguous
  int64_t x_stride_b, x_stride_h, x_stride_l;
  DType x_dtype;
  const void* rotations;  // [rotation_heads, D, R, columns], contiguous; columns = sum(factors) / 2
  DType rotations_dtype;
  int64_t rotation_heads;        // H, or 1: the same rotations for every head
  const bool* key_padding_mask;  // [B, L] contiguous, true = padding; null: none
  int32_t* buckets;              // [B, H, R, L] contiguous, out
  void* workspace;               // lsh_hash_workspace(...) bytes, 256-byte aligned
  int64_t batch, heads, length, head_dim, rounds;
  int n_factors;
  int32_t factors[kMaxHashFactors];  // even, >= 2; the padding bucket is their product
};

}  // namespace reformer::kernels

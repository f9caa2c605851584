// The arguments of chunked attention. No CUDA here.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace reformer::kernels {

// [B, H, L, D], last dimension contiguous, rows 16-byte aligned.
struct HeadsView {
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

struct ChunkedAttentionParams {
  HeadsView q;
  HeadsView k;  // data null: shared QK, keys are the length-normalised queries
  HeadsView v;
  HeadsView own_values;    // of a query that meets only itself under mask_self; else v
  const int32_t* order;    // [B, H, R, L] contiguous; null: one round in natural order
  const int32_t* buckets;  // [B, H, R, L] contiguous; null: pairs of different buckets may attend
  const bool* key_padding_mask;  // [B, L] contiguous, true = padding; null: none
  const int64_t* dropout_seed;   // one word on the device; null iff dropout_p == 0
  DType dtype;                   // of q, k, v, out and their gradients
  int64_t batch, heads, length, head_dim, rounds;
  int64_t chunk_size, look_back, look_ahead;
  bool causal, mask_self, wrap, correct_duplicates;
  float scale;
  double dropout_p;

  HeadsView out;  // forward: written; backward: read
  float* lse;     // [B, H, L] contiguous; forward: written; backward: read
  void* workspace;
  int64_t workspace_cap;  // bytes: heads are taken in groups that need no more, one head at least
};

struct ChunkedAttentionBackwardParams : ChunkedAttentionParams {
  HeadsView grad_out;
  const float* grad_lse;  // [B, H, L] contiguous; null: zero
  HeadsView grad_q;
  HeadsView grad_k;       // data null iff k.data is
  HeadsView grad_v;       // scratch before it is written: overlaps nothing
  bool own_values_apart;  // own_values are not v: grad_v gets nothing from queries that met only
                          // themselves
};

// The lse of a query whose only valid key is itself under mask_self (its output is then that of
// own_values). It marks these queries: another lse that happens to be the same is stored as the
// next number above.
inline constexpr float kSelfOnlyLse = -1e5f, kAboveSelfOnlyLse = -99999.9921875f;

}  // namespace reformer::kernels

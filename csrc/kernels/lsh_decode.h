// Attention of new queries to the cached positions of their buckets, and the cache's growth.
//
// The cache: keys and values [B, H, C, D] in rows that begin at multiples of 16 bytes, and per
// head, round and bucket the last W positions that fell into it: table [B, H, R, N, W], counts
// [B, H, R, N]. Position number i of a bucket is in slot i % W. All contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace reformer::kernels {

// Rows [B, H, T, D] whose last dimension is contiguous; strides in elements, any alignment.
struct NewRows {
  const void* data;
  int64_t stride_b, stride_h, stride_t;
};

struct LshDecodeParams {
  NewRows q;
  NewRows own_values;  // of a query that finds no key; null: it gets zeros
  NewRows out;         // written
  float* lse;          // [B, H, T], out; of a query that finds no key self_only_lse, or -inf
  const void *keys, *values;
  const int32_t *table, *counts;
  const int32_t* buckets;  // [B, H, R, T]; outside [0, N): finds nothing
  const int64_t* before;   // [B]: query t finds only positions below before[b] + t; null: any
  void* workspace;         // lsh_decode_workspace(...) bytes, 16-byte aligned
  DType dtype;
  int64_t batch, heads, queries, head_dim, capacity, rounds, n_buckets, window;
  float scale, self_only_lse;
  bool correct_duplicates;
};

// D is a multiple of 8, at most 256, and R * W at most this.
inline constexpr int64_t kMaxDecodeSlots = int64_t{1} << 28;

// Bytes of scratch that lsh_decode needs for these sizes: 0 but for correct_duplicates with more
// slots than shared memory has room for.
int64_t lsh_decode_workspace(const LshDecodeParams& params);

// Enqueues; never synchronises or allocates. Deterministic, whatever the order in the table.
// Positions outside [0, C) are passed over.
cudaError_t lsh_decode(const LshDecodeParams& params, cudaStream_t stream);

struct LshCacheAppendParams {
  void *keys, *values;
  int32_t *table, *counts;
  NewRows k, v;    // rows begin at multiples of 16 bytes
  bool normalize;  // k is brought to length one
  // Null, or [own, next][H]: a value is kept as own v_t + next v_{t+1}, where padding (a row that
  // no bucket of the first round takes) is no next value, but the row itself. The last row is kept
  // as it is, and the one before the new ones is completed from last_values [B, H, D], the last v
  // before them, which the last that is no padding replaces.
  const float* value_mix;
  void* last_values;
  const int32_t* buckets;  // [B, H, R, T]; outside [0, N): no bucket takes the position
  const int64_t* lengths;  // [B]: row t of batch b becomes position lengths[b] + t, if that is < C
  // For many rows: [B, H, R, T], the rows by (bucket, row), those without a bucket last, and
  // scratch [B, H, R, N]. Null: the rows are counted one after the other.
  const int32_t* order;
  int32_t* scratch;
  DType dtype;
  int64_t batch, heads, rows, head_dim, capacity, rounds, n_buckets, window;
};

// D is a multiple of 8, at most 256. Up to so many rows counting takes no longer than sorting.
inline constexpr int64_t kRowsCounted = 512;

// Enqueues; never synchronises or allocates. Deterministic.
cudaError_t lsh_cache_append(const LshCacheAppendParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

// The stages chunked attention is made of, shared by its entry point (entry.cu) and by the main
// kernels: generic/ (any shape and flag, sm_80 up) and tiled/ (shared QK, chunks of 64 with one
// before them, half precision), which has instances by wgmma (sm_90a) and by mma.sync (sm_80 up).
// local/ has kernels of its own, without stages.
//
//   forward:   key_scale (generic), pair_bits (tiled, masked) -> main (one partial per round)
//              -> combine
//   backward:  row_stats, pair_bits (tiled, masked) -> main (one partial gradient per round)
//              -> reduce
//
// A stage covers head_count of the batch * heads sequences, from head_begin on: the entry point
// runs groups of heads one after the other, so that the workspace stays bounded.
#pragma once

#include "chunked_attention.h"

namespace reformer::kernels {

// |q| is taken to be at least this where a key is q / |q|; 1 / eps marks keys below it.
inline constexpr float kMinKeyNorm = 1e-12f;
inline constexpr float kMaxKeyScale = 1 / kMinKeyNorm;

// Within one round a window is a set, so that only several rounds can hold a pair twice.
inline bool corrects_duplicates(const ChunkedAttentionParams& params) {
  return params.correct_duplicates && params.rounds > 1 && params.order != nullptr;
}

// Pairs of one query chunk and one chunk of its keys: what a thread of a warpgroup needs to know of
// those in its part of the scores. Bit 4 j + e is element [j][e]'s of its accumulator (wgmma.cuh).
struct PairBits {
  uint32_t blocked;  // may not attend
  uint32_t dropped;  // its weight counts in the softmax alone; only under dropout
};
enum PairTile { kOwnKeys, kPreviousKeys };
inline constexpr int kPairThreads = 128;

// Whether more than positions and padding decides about pairs.
inline bool needs_pair_bits(const ChunkedAttentionParams& params) {
  return params.buckets != nullptr || params.dropout_p > 0 || corrects_duplicates(params);
}

struct ForwardStage {
  int64_t head_begin, head_count;
  const float* key_scale;  // [head_count, L]: 1 / max(|q|, eps), for generic_forward; null for
                           // separate keys
  void*
      partial_out;  // [head_count, R, L, D], params.dtype: softmax-weighted values within the round
  float* partial_lse;  // [head_count, R, L]: log2 of the round's sum of exp; -inf without valid key
  const int32_t* chunk_numbers;  // [head_count, L, R]: a position's chunk within each round; null
                                 // unless duplicates are corrected
  const void* pair_bits;  // [head_count, R, chunks, PairTile, kPairThreads], for wgmma_forward:
                          // PairBits under dropout, else the blocked ones; null unless needed
};

// is_padding of a row of shared QK whose q, v or cotangent is not finite: it counts as zeros in all
// of them, as 0 * NaN is NaN.
inline constexpr float kSpoiltPadding = 2;

// One row's constants in the backward pass, 16 bytes so that one load fetches them.
struct alignas(16) RowStats {
  float lse;    // final lse in log2 units; +inf for rows whose weights must vanish (no key, self
                // only, or no cotangent: such a query contributes nothing, whatever it is)
  float delta;  // grad_out . out - grad_lse
  float key_scale;   // 1 / max(|q|, eps) for shared QK, else 1
  float is_padding;  // 1 for padding, else 0; kSpoiltPadding
};

// An lse as stored: see kSelfOnlyLse.
__device__ __forceinline__ float stored_lse(float lse) {
  return lse == kSelfOnlyLse ? kAboveSelfOnlyLse : lse;
}

// What half-precision kernels take for a final lse (in log2 units) when they recompute weights
// exp2(logit - lse): logits and lse are rounded, and where that makes a difference, no weight may
// come out beyond 1, which gradients would be multiplied with.
__device__ __forceinline__ float bounding_lse(float lse) {
  constexpr float kLarge = 1 << 17, kRounding = 1.0F / (1 << 20);
  const float size = fabsf(lse);
  return size > kLarge ? fmaf(size, kRounding, lse) : lse;
}

// Where the tiled kernels find a position's RowStats: in the head's rows of grad_v, `per_row` in
// each, so that their workspace is for partial gradients alone. Reduce writes the gradients there.
__device__ __forceinline__ const RowStats* row_stats_in(const uint8_t* grad_v, int64_t row_bytes,
                                                        uint32_t per_row, uint32_t position) {
  return reinterpret_cast<const RowStats*>(grad_v + position / per_row * row_bytes) +
         position % per_row;
}

struct BackwardStage {
  int64_t head_begin, head_count;
  RowStats* row_stats;  // [head_count, L], for generic_backward; null: see row_stats_in
  void* partial_q;      // [head_count, R, L, D], params.dtype; shared QK without partial_k: dq plus
                        // the projected dk
  void* partial_k;  // [head_count, R, L, D]: gradient of the keys, normalised ones for shared QK
                    // (reduce projects their sum); null for shared QK but by generic_backward
  void* partial_v;  // [head_count, R, L, D]
  const int32_t* chunk_numbers;  // as in the forward stage
  const void* pair_bits;         // as in the forward stage, of the transposed scores
};

// The main kernels never let a query attend to itself under mask_self: combine and reduce give a
// query without any other key its own value.

cudaError_t generic_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                            cudaStream_t stream);
cudaError_t generic_backward(const ChunkedAttentionBackwardParams& params,
                             const BackwardStage& stage, cudaStream_t stream);

// Works out the bits of head_count heads. keys_in_rows: of the transposed scores.
int64_t pair_bits_size(const ChunkedAttentionParams& params, int64_t head_count);
cudaError_t make_pair_bits(const ChunkedAttentionParams& params, int64_t head_begin,
                           int64_t head_count, const int32_t* chunk_numbers, bool keys_in_rows,
                           void* pair_bits, cudaStream_t stream);

// True where the wgmma instance covers these sizes and flags on the current device.
bool wgmma_supports(const ChunkedAttentionParams& params);
cudaError_t wgmma_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                          cudaStream_t stream);
cudaError_t wgmma_backward(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                           cudaStream_t stream);

// The same by mma.sync.
bool mma_sync_supports(const ChunkedAttentionParams& params);
cudaError_t mma_sync_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                             cudaStream_t stream);
cudaError_t mma_sync_backward(const ChunkedAttentionBackwardParams& params,
                              const BackwardStage& stage, cudaStream_t stream);

// Local attention by wgmma: both passes whole, without stages. True where they cover these sizes
// and flags on the current device.
bool local_supports(const ChunkedAttentionParams& params);
cudaError_t local_forward(const ChunkedAttentionParams& params, cudaStream_t stream);
int64_t local_backward_workspace(const ChunkedAttentionParams& params);
cudaError_t local_backward(const ChunkedAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

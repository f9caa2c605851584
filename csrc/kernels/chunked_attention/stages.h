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
#include "chunked_attention/plan.h"
#include "chunked_attention/stage.h"

namespace reformer::kernels {

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

// The main kernels never let a query attend to itself under mask_self: combine and reduce give a
// query without any other key its own value.

cudaError_t generic_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                            cudaStream_t stream);
cudaError_t generic_backward(const ChunkedAttentionBackwardParams& params,
                             const BackwardStage& stage, cudaStream_t stream);

// Works out the bits of head_count heads. keys_in_rows: of the transposed scores.
cudaError_t make_pair_bits(const ChunkedAttentionParams& params, int64_t head_begin,
                           int64_t head_count, const int32_t* chunk_numbers, bool keys_in_rows,
                           void* pair_bits, cudaStream_t stream);

// What the current device offers, and whether this build has wgmma code for it.
cudaError_t attention_device(DeviceTraits* traits, bool* has_wgmma);

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

// Local attention by wgmma: both passes whole, without stages.
cudaError_t local_forward(const ChunkedAttentionParams& params, cudaStream_t stream);
cudaError_t local_backward(const ChunkedAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

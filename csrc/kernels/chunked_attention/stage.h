// What the stages of chunked attention hand to each other: stages.h. No CUDA here.
#pragma once

#include <cstdint>

#include "chunked_attention/params.h"

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

}  // namespace reformer::kernels

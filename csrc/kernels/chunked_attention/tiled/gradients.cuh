// What the backward kernels of chunked attention share: backward.cuh for head dims up to
// 64, wgmma_backward_128.cu for 128.
#pragma once

#include "chunked_attention/tiled/masks.cuh"

namespace reformer::kernels::tiled {

template <typename Element>
struct BackwardArgs {
  Rows q, v, grad_out;
  Rows row_stats;  // in the rows of grad_v
  const int32_t* order;
  Element* partial_q;
  Element* partial_v;
  Line line;
  int heads, head_begin, run_length = 0;
  float scale, scale_log2;  // scale_log2: scale * log2(e)
  bool has_padding;
  MaskArgs masks;

  BackwardArgs(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage)
      : q(params.q, sizeof(Element)),
        v(params.v, sizeof(Element)),
        grad_out(params.grad_out, sizeof(Element)),
        row_stats(params.grad_v, sizeof(Element)),
        order(params.order),
        partial_q(static_cast<Element*>(stage.partial_q)),
        partial_v(static_cast<Element*>(stage.partial_v)),
        line(make_line(params)),
        heads(static_cast<int>(params.heads)),
        head_begin(static_cast<int>(stage.head_begin)),
        scale(params.scale),
        scale_log2(params.scale * kLog2E),
        has_padding(params.key_padding_mask != nullptr),
        masks(params, stage.pair_bits) {}
};

// causal: a query attends if its position is greater; else unless it is equal.
template <bool kCausal>
__device__ __forceinline__ int key_bound(const Line& line, int position, bool valid) {
  if (!valid) return kInvalidKey;
  if (kCausal) return line.mask_self ? position : position - 1;
  return line.mask_self ? position : -2;
}

// The factor of a key's dS^T row: scale and the key's normalisation. Zero rows of q have key_scale
// 1 / eps, out of fp16's range; their keys are zero and get no gradient there, rather than
// infinities for all.
template <typename Element>
__device__ __forceinline__ float gradient_scale(float key_scale, float scale) {
  constexpr float kLargest = 1 << 24;  // 1 / the smallest norm of a non-zero fp16 row
  if (std::is_same_v<Element, __half> && key_scale > kLargest) return 0.0F;
  return key_scale * scale;
}

// Two neighbouring queries, as a thread meets them.
struct alignas(16) QueryPair {
  float lse[2];  // as RowStats has it
  int position[2];
};

// Copies what a row of a chunk needs to know, once as a key and once as a query. Rows past the end
// have no weight and are no keys. row_stats: the head's.
template <int kHeadDim>
__device__ __forceinline__ void copy_row_stats(RowStats* stats, QueryPair* queries, float* deltas,
                                               const uint8_t* row_stats, int row_bytes,
                                               int position, uint32_t row, bool is_inside) {
  QueryPair& pair = queries[row / 2];
  pair.position[row % 2] = position;
  if (is_inside) {
    constexpr uint32_t kPerRow = kHeadDim * 2 / sizeof(RowStats);
    const RowStats* own = row_stats_in(row_stats, row_bytes, kPerRow, position);
    copy_async<16>(shared_address(&stats[row]), own);
    copy_async<4>(shared_address(&pair.lse[row % 2]), &own->lse);
    copy_async<4>(shared_address(&deltas[row]), &own->delta);
  } else {
    stats[row] = {INFINITY, 0.0F, 0.0F, 1.0F};
    pair.lse[row % 2] = INFINITY;
    deltas[row] = 0.0F;
  }
}

// P^T = exp2(logits - lse) from S^T = K Q^T: to `weights` as an operand, to `scores` times the
// key's gradient factor. Rows are keys, columns queries. Dropout is for the operand alone.
template <typename Element, bool kCausal, int kMasks>
__device__ __forceinline__ void recompute_weights(Fragments& weights, Accumulator& scores,
                                                  const float (&logit_scales)[2],
                                                  const float (&gradient_scales)[2],
                                                  const Pairs<false, kCausal, kMasks>& pairs,
                                                  const QueryPair* queries, uint32_t thread) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const QueryPair pair = queries[4 * j + thread % 4];
    const auto columns = pairs.columns(j, pair.position);
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float weight = exp2_approx(fmaf(scores[j][e], logit_scales[e / 2], -pair.lse[e % 2]));
      p[e] = columns.attend(e) ? weight : 0.0F;
      scores[j][e] = p[e] * gradient_scales[e / 2];
      if constexpr (kMasks == kDropped) p[e] = columns.drop(e) ? 0.0F : p[e];
    }
    pack_columns<Element>(weights, j, p[0], p[1], p[2], p[3]);
  }
}

// dS^T = P^T (dP^T - delta), packed; scaled_weights are P^T times the gradient factor. Under
// dropout dP^T counts dropout_scale-fold where the pair was kept, else not at all.
template <typename Element, bool kCausal, int kMasks>
__device__ __forceinline__ void score_gradients(Fragments& gradients,
                                                const Accumulator& scaled_weights,
                                                const Accumulator& weight_gradients,
                                                const Pairs<false, kCausal, kMasks>& pairs,
                                                float dropout_scale, const float* query_deltas,
                                                uint32_t thread) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 deltas = reinterpret_cast<const float2*>(query_deltas)[4 * j + thread % 4];
    const float delta[2] = {deltas.x, deltas.y};
    float ds[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float difference;
      if constexpr (kMasks == kDropped) {
        const float factor = pairs.columns(j, {0, 0}).drop(e) ? 0.0F : dropout_scale;
        difference = fmaf(weight_gradients[j][e], factor, -delta[e % 2]);
      } else {
        difference = weight_gradients[j][e] - delta[e % 2];
      }
      ds[e] = scaled_weights[j][e] * difference;
    }
    pack_columns<Element>(gradients, j, ds[0], ds[1], ds[2], ds[3]);
  }
}

// An accumulator in half the registers.
template <int kColumns>
using PackedTile = uint32_t[kColumns / 8][2];

template <typename Element, int kGroups>
__device__ __forceinline__ void pack_tile(uint32_t (&packed)[kGroups][2],
                                          const float (&tile)[kGroups][4]) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    packed[i / 2][i % 2] = pack<Element>(tile[i / 2][i % 2 * 2], tile[i / 2][i % 2 * 2 + 1]);
  }
}

// The thread's elements of a tile in shared memory, placed as an accumulator's.
template <int kGroups>
__device__ __forceinline__ void load_packed(uint32_t (&packed)[kGroups][2], const uint8_t* tile,
                                            uint32_t upper_row, uint32_t thread) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    packed[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(
        tile + swizzled(upper_row + 8 * (i % 2), i / 2) + thread % 4 * 4);
  }
}

// Adds to each of the thread's two rows its part of the dot product of a and b.
template <typename Element, int kGroups>
__device__ __forceinline__ void add_dots(float (&dots)[2], const float (&a)[kGroups][4],
                                         const uint32_t (&b)[kGroups][2]) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int j = i / 2, half = i % 2;
    const float2 pair = unpack<Element>(b[j][half]);
    dots[half] += pair.x * a[j][2 * half] + pair.y * a[j][2 * half + 1];
  }
}

// Through the normalisation k = q / |q|: grad_k, the gradient of k divided by |q| already, loses
// its part along k, unless the norm is clamped. That part is this factor times q; dot: grad_k . q.
__device__ __forceinline__ float projection(float dot, float key_scale) {
  return key_scale < kMaxKeyScale ? dot * key_scale * key_scale : 0.0F;
}

// wgmma_backward for head_dim 128.
cudaError_t backward_128(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                         cudaStream_t stream);

}  // namespace reformer::kernels::tiled

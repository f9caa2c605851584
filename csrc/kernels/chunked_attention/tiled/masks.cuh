// Masks of the tiled kernels beyond order, self and padding: a kernel before them has worked out
// which pairs may attend (pair_bits.cu), and the plain instances pay nothing.
#pragma once

#include "chunked_attention/tiled/tiled.cuh"

namespace reformer::kernels::tiled {

inline constexpr int kPlain = 0;    // who attends to whom is a matter of positions
inline constexpr int kBlocked = 1;  // of bits
inline constexpr int kDropped = 2;  // of bits, and so is which weights count

struct MaskArgs {
  const void* pair_bits;  // see ForwardStage
  float dropout_scale;    // of the weights that are kept

  MaskArgs(const ChunkedAttentionParams& params, const void* pair_bits)
      : pair_bits(pair_bits), dropout_scale(static_cast<float>(1 / (1 - params.dropout_p))) {}
};

// Calls launch(Element{}, integral_constant<int, head_dim>, bool_constant<causal>,
// integral_constant<int, masks>). Where there are bits, these know of causality.
template <int... kHeadDims, typename Launch>
cudaError_t dispatch_masks(const ChunkedAttentionParams& params, Launch launch) {
  return dispatch<kHeadDims...>(params, [&](auto element, auto head_dim, auto causal) {
    const std::false_type known;
    if (params.dropout_p > 0) {
      return launch(element, head_dim, known, std::integral_constant<int, kDropped>{});
    }
    if (needs_pair_bits(params)) {
      return launch(element, head_dim, known, std::integral_constant<int, kBlocked>{});
    }
    return launch(element, head_dim, causal, std::integral_constant<int, kPlain>{});
  });
}

// The thread's bits of one tile of scores: the queries of a chunk with one of its two chunks of
// keys.
template <int kMasks>
__device__ __forceinline__ PairBits load_pair_bits(const MaskArgs& args, const Line& line,
                                                   Chunk queries, PairTile tile, uint32_t thread) {
  if constexpr (kMasks == kPlain) return {};
  const int chunk = queries.round * line.chunks_per_round + queries.index;
  const int64_t tiles_before = (int64_t{renewed(blockIdx.y)} * line.chunks() + chunk) * 2 + tile;
  const int64_t index = tiles_before * kThreads + thread;
  if constexpr (kMasks == kDropped) {
    const uint2 both = __ldcs(static_cast<const uint2*>(args.pair_bits) + index);
    return {both.x, both.y};
  } else {
    return {__ldcs(static_cast<const uint32_t*>(args.pair_bits) + index), 0};
  }
}

__device__ __forceinline__ bool has_bit(uint32_t bits, int j, int e) {
  return (bits >> (4 * j + e) & 1) != 0;
}

template <bool kQueryRows, bool kCausal>
__device__ __forceinline__ bool may_meet(int of_row, int of_column) {
  return kQueryRows ? may_attend<kCausal>(of_column, of_row)
                    : may_attend<kCausal>(of_row, of_column);
}

// The pairs of a thread's two rows with a tile's columns. Masked instances know them as bits, plain
// ones compare bounds as they go. kQueryRows: rows are queries and columns keys, else the other way
// round.
template <bool kQueryRows, bool kCausal, int kMasks>
struct Pairs {
  PairBits bits;

  __device__ __forceinline__ Pairs(const int (&)[2], PairBits bits) : bits(bits) {}
  // The same, with bits that the compiler does not test long before their use.
  __device__ __forceinline__ Pairs renewed() const {
    PairBits copy = bits;
    copy.blocked = tiled::renewed(copy.blocked);
    if constexpr (kMasks == kDropped) copy.dropped = tiled::renewed(copy.dropped);
    return {{0, 0}, copy};
  }
  // The thread's pairs with its two of the columns 8 j, ..., whose bounds these are.
  struct Columns {
    PairBits bits;
    int j;
    __device__ __forceinline__ bool attend(int e) const { return !has_bit(bits.blocked, j, e); }
    __device__ __forceinline__ bool drop(int e) const { return has_bit(bits.dropped, j, e); }
  };
  __device__ __forceinline__ Columns columns(int j, const int (&)[2]) const { return {bits, j}; }
};
template <bool kQueryRows, bool kCausal>
struct Pairs<kQueryRows, kCausal, kPlain> {
  const int (&row_bounds)[2];

  __device__ __forceinline__ Pairs(const int (&row_bounds)[2], PairBits) : row_bounds(row_bounds) {}
  __device__ __forceinline__ const Pairs& renewed() const { return *this; }
  struct Columns {
    int bounds[2];
    const int (&row_bounds)[2];
    __device__ __forceinline__ bool attend(int e) const {
      return may_meet<kQueryRows, kCausal>(row_bounds[e / 2], bounds[e % 2]);
    }
    __device__ __forceinline__ bool drop(int) const { return false; }
  };
  __device__ __forceinline__ Columns columns(int, const int (&bounds)[2]) const {
    return {{bounds[0], bounds[1]}, row_bounds};
  }
};

}  // namespace reformer::kernels::tiled

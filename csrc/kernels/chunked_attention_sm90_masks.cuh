// Masks of the wgmma kernels beyond order, self and padding, as template flags of theirs: the plain
// instances pay nothing for them.
#pragma once

#include "chunked_attention_sm90.cuh"
#include "dropout.h"

namespace reformer::kernels::sm90 {

inline constexpr int kPlain = 0;
inline constexpr int kSameBucket = 1;  // pairs of different buckets do not attend
inline constexpr int kDropout = 2;
inline constexpr int64_t kLargestMaskedHeadDim = 64;

struct MaskArgs {
  const int32_t* buckets;  // [B * H, R, L], by position
  const int64_t* dropout_seed;
  uint32_t dropout_threshold;
  float dropout_scale;  // of the weights that are kept

  explicit MaskArgs(const ChunkedAttentionParams& params)
      : buckets(params.buckets),
        dropout_seed(params.dropout_seed),
        dropout_threshold(reformer::dropout_threshold(params.dropout_p)),
        dropout_scale(static_cast<float>(1 / (1 - params.dropout_p))) {}
};

inline int masks_of(const ChunkedAttentionParams& params) {
  return (params.buckets != nullptr ? kSameBucket : kPlain) |
         (params.dropout_p > 0 ? kDropout : kPlain);
}

// Calls launch(integral_constant<int, masks>), if there are instances of these for the head dim.
template <int kHeadDim, typename Launch>
cudaError_t dispatch_masks(const ChunkedAttentionParams& params, Launch launch) {
  const int masks = masks_of(params);
  if (masks == kPlain) return launch(std::integral_constant<int, kPlain>{});
  if constexpr (kHeadDim <= kLargestMaskedHeadDim) {
    switch (masks) {
      case kSameBucket:
        return launch(std::integral_constant<int, kSameBucket>{});
      case kDropout:
        return launch(std::integral_constant<int, kDropout>{});
      case kSameBucket | kDropout:
        return launch(std::integral_constant<int, kSameBucket | kDropout>{});
    }
  }
  return cudaErrorInvalidValue;
}

// In shared memory: what the masks need to know of the rows in the ring of tiles.
template <bool kUsed>
struct BucketRows {
  alignas(16) int bucket[kSlots][kTileRows];
};
template <>
struct BucketRows<false> {};

template <bool kUsed>
struct DropoutRows {
  alignas(16) uint32_t query_part[kSlots][kTileRows];  // for is_dropped
  alignas(16) uint32_t key_part[kSlots][kTileRows];
  uint32_t head_key;
};
template <>
struct DropoutRows<false> {};

template <int kMasks>
struct MaskRows : BucketRows<(kMasks & kSameBucket) != 0>, DropoutRows<(kMasks & kDropout) != 0> {
  // Before the first fetch, by one thread; a barrier follows.
  __device__ __forceinline__ void begin(const MaskArgs& args, int head) {
    if constexpr (kMasks & kDropout) {
      this->head_key =
          dropout_head_key(static_cast<uint64_t>(*args.dropout_seed), static_cast<uint32_t>(head));
    }
  }

  // A row of a chunk into a slot of the ring, in part as asynchronous copies. round_begin: the
  // round's in [B * H, R, L].
  __device__ __forceinline__ void fetch(const MaskArgs& args, int64_t round_begin, int round,
                                        uint32_t slot, uint32_t row, int position) {
    if constexpr (kMasks & kSameBucket) {
      copy_async<4>(shared_address(&this->bucket[slot][row]),
                    args.buckets + round_begin + position);
    }
    if constexpr (kMasks & kDropout) {
      const auto token = static_cast<uint32_t>(position);
      const uint32_t round_key = dropout_round_key(this->head_key, static_cast<uint32_t>(round));
      this->query_part[slot][row] = dropout_query_part(dropout_row_key(round_key, token));
      this->key_part[slot][row] = dropout_key_part(token);
    }
  }
};

// What becomes of a thread's pairs of one tile of scores: bit 4 j + e is that of element [j][e] of
// its accumulator.
struct PairBits {
  uint32_t blocked;  // may not attend
  uint32_t dropped;
};
__device__ __forceinline__ bool has_bit(uint32_t bits, int j, int e) {
  return (bits >> (4 * j + e) & 1) != 0;
}
// Keeps the compiler from testing bits long before their use.
template <int kMasks>
__device__ __forceinline__ PairBits renewed(PairBits bits) {
  if constexpr (kMasks != kPlain) bits.blocked = renewed(bits.blocked);
  if constexpr (kMasks & kDropout) bits.dropped = renewed(bits.dropped);
  return bits;
}

template <bool kQueryRows, bool kCausal>
__device__ __forceinline__ bool may_meet(int of_row, int of_column) {
  return kQueryRows ? may_attend<kCausal>(of_column, of_row)
                    : may_attend<kCausal>(of_row, of_column);
}

// Of the tile with rows in row_slot and columns in column_slot. kQueryRows: rows are queries and
// columns keys, else the other way round; row_bounds and column_bounds: theirs, for may_attend. In
// loops that are not unrolled, and before the scores take up the registers.
template <bool kQueryRows, bool kCausal, int kMasks>
__device__ __forceinline__ PairBits pair_bits(const MaskRows<kMasks>& rows, const MaskArgs& args,
                                              uint32_t row_slot, uint32_t column_slot,
                                              const int (&row_bounds)[2], const int* column_bounds,
                                              uint32_t upper_row, uint32_t thread) {
  PairBits bits{};
  if constexpr (kMasks != kPlain) {
    const uint32_t quad_column = thread % 4 * 2;
    int row_buckets[2];
    if constexpr (kMasks & kSameBucket) {
      row_buckets[0] = rows.bucket[row_slot][upper_row];
      row_buckets[1] = rows.bucket[row_slot][upper_row + 8];
    }
#pragma unroll 2
    for (int j = 0; j < 8; ++j) {
      const uint32_t column = 8 * j + quad_column;
      const int2 bounds = *reinterpret_cast<const int2*>(&column_bounds[column]);
      int2 buckets{};
      if constexpr (kMasks & kSameBucket) {
        buckets = *reinterpret_cast<const int2*>(&rows.bucket[column_slot][column]);
      }
      uint32_t nibble = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int of_row = row_bounds[e / 2], of_column = e % 2 == 0 ? bounds.x : bounds.y;
        bool valid = may_meet<kQueryRows, kCausal>(of_row, of_column);
        if constexpr (kMasks & kSameBucket) {
          valid = valid && row_buckets[e / 2] == (e % 2 == 0 ? buckets.x : buckets.y);
        }
        if (!valid) nibble |= 1U << (28 + e);
      }
      bits.blocked = bits.blocked >> 4 | nibble;
    }
  }
  if constexpr (kMasks & kDropout) {
    const auto& row_parts = kQueryRows ? rows.query_part[row_slot] : rows.key_part[row_slot];
    const auto& column_parts =
        kQueryRows ? rows.key_part[column_slot] : rows.query_part[column_slot];
    const uint32_t own[2] = {row_parts[upper_row], row_parts[upper_row + 8]};
#pragma unroll 2
    for (int j = 0; j < 8; ++j) {
      const uint2 pair = *reinterpret_cast<const uint2*>(&column_parts[8 * j + thread % 4 * 2]);
      uint32_t nibble = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (is_dropped(own[e / 2], e % 2 == 0 ? pair.x : pair.y, args.dropout_threshold)) {
          nibble |= 1U << (28 + e);
        }
      }
      bits.dropped = bits.dropped >> 4 | nibble;
    }
  }
  return bits;
}

// The pairs of a thread's two rows with a tile's columns. Masked instances know them as bits, plain
// ones compare bounds as they go.
template <bool kQueryRows, bool kCausal, int kMasks>
struct Pairs {
  PairBits bits;

  __device__ __forceinline__ Pairs(const int*, const int (&)[2], PairBits bits) : bits(bits) {}
  __device__ __forceinline__ Pairs renewed() const {
    return {nullptr, {0, 0}, sm90::renewed<kMasks>(bits)};
  }
  // The thread's pairs with columns 8 j, ...; its own of these begin at `column`.
  struct Columns {
    PairBits bits;
    int j;
    __device__ __forceinline__ bool attend(int e) const { return !has_bit(bits.blocked, j, e); }
    __device__ __forceinline__ bool drop(int e) const { return has_bit(bits.dropped, j, e); }
  };
  __device__ __forceinline__ Columns columns(int j, uint32_t) const { return {bits, j}; }
};
template <bool kQueryRows, bool kCausal>
struct Pairs<kQueryRows, kCausal, kPlain> {
  const int* column_bounds;
  const int (&row_bounds)[2];

  __device__ __forceinline__ Pairs(const int* column_bounds, const int (&row_bounds)[2], PairBits)
      : column_bounds(column_bounds), row_bounds(row_bounds) {}
  __device__ __forceinline__ const Pairs& renewed() const { return *this; }
  struct Columns {
    int2 bounds;
    const int (&row_bounds)[2];
    __device__ __forceinline__ bool attend(int e) const {
      return may_meet<kQueryRows, kCausal>(row_bounds[e / 2], e % 2 == 0 ? bounds.x : bounds.y);
    }
    __device__ __forceinline__ bool drop(int) const { return false; }
  };
  __device__ __forceinline__ Columns columns(int, uint32_t column) const {
    return {*reinterpret_cast<const int2*>(&column_bounds[column]), row_bounds};
  }
};

}  // namespace reformer::kernels::sm90

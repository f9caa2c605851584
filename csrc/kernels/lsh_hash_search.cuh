// What the tensor-core instances of the hash share on the device: tokens as A operands, and the
// search through the products, in registers, for the largest absolute value of each factor.
//
// A warp holds row tiles of 16 tokens. Their products with 8 columns are float[4] per thread and
// row tile, as mma.sync and wgmma give them: elements 2 * half and 2 * half + 1 are row
// lane / 4 + 8 * half at the columns 2 * (lane % 4) and one more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "lsh_hash_packed.h"

namespace reformer::kernels::packed_hash {

// ---- Factors

// The tiles of a chunk whose factors are known at compile time. A chunk must be whole rounds.
template <int kChunkTiles, int... kFactorTiles>
struct StaticFactors {
  static constexpr bool kStatic = true;
  static constexpr int kChunk = kChunkTiles;
  static_assert(kChunk % (kFactorTiles + ...) == 0, "a round must not straddle chunks");

  static bool match(const HashColumns& columns) {
    constexpr int kTiles[] = {kFactorTiles...};
    if (columns.n_factors != sizeof...(kFactorTiles)) return false;
    return std::equal(
        std::begin(kTiles), std::end(kTiles), columns.factors,
        [](int tiles, const HashColumns::Factor& factor) { return tiles == factor.tiles; });
  }

  // Per tile one bit: it begins a factor, it ends one, it ends a round. Per tile four bits: its
  // factor, and the tile its factor begins with.
  struct Map {
    uint32_t begins = 0, ends = 0, ends_round = 0;
    uint64_t factor = 0, first_tile = 0;
  };
  static constexpr Map map() {
    constexpr int kTiles[] = {kFactorTiles...};
    constexpr int kFactors = sizeof...(kFactorTiles);
    Map map;
    for (int tile = 0, f = 0; tile < kChunk; tile += kTiles[f], f = (f + 1) % kFactors) {
      const int last = tile + kTiles[f] - 1;
      map.begins |= 1u << tile;
      map.ends |= 1u << last;
      if (f == kFactors - 1) map.ends_round |= 1u << last;
      for (int i = tile; i <= last; ++i) {
        map.factor |= uint64_t(f) << (4 * i);
        map.first_tile |= uint64_t(tile) << (4 * i);
      }
    }
    return map;
  }
  static constexpr uint32_t kBegins = map().begins, kEnds = map().ends,
                            kEndsRound = map().ends_round;
  static constexpr uint64_t kFactor = map().factor, kFirstTile = map().first_tile;
};

// Any others: the walk through them is kept at run time.
template <int kChunkTiles>
struct AnyFactors {
  static constexpr bool kStatic = false;
  static constexpr int kChunk = kChunkTiles;
};

// ---- Tokens

// Where the tokens of a warp stand. Four lanes share kSlots of them: slot 2 * i + half is row
// lane / 4 + 8 * half of row tile i. Of these, each lane ends up with the results of kKept, from
// slot lane % 4 * kSlots / 4 on; the order of the tokens is such that neighbouring lanes then hold
// neighbouring tokens.
template <int kRowTiles>
struct WarpTokens {
  static_assert(kRowTiles == 1 || kRowTiles == 2 || kRowTiles == 4);
  static constexpr int kTokens = 16 * kRowTiles;
  static constexpr int kSlots = 2 * kRowTiles;
  static constexpr int kKept = kSlots < 4 ? 1 : kSlots / 4;
  static constexpr int kKeptStride = 32;  // from one kept token to the next
  static constexpr int kShared = kSlots / kKept;

  // From the warp's first.
  static __device__ __forceinline__ int token(int slot) {
    const int quad = static_cast<int>(threadIdx.x) % 32 / 4;
    return slot % kKept * kKeptStride + quad * kShared + slot / kKept;
  }
  static __device__ __forceinline__ int first_kept_slot() {
    return static_cast<int>(threadIdx.x) % 4 * kSlots / 4;
  }
  // With fewer tokens than lanes, two lanes have the same result.
  static __device__ __forceinline__ bool is_first_keeper() {
    return kSlots >= 4 || threadIdx.x % 2 == 0;
  }
};

// kSteps multiplies of depth 16.
template <int kRowTiles, int kSteps>
using Tokens = uint4[2 * kRowTiles][kSteps / 2];
template <int kRowTiles, int kSteps>
using Operands = uint32_t[kRowTiles][kSteps][4];

// A thread's share of the warp's tokens; zeros beyond the end of the sequence.
template <int kRowTiles, int kSteps>
__device__ __forceinline__ void load_tokens(uint4 (&tokens)[2 * kRowTiles][kSteps / 2],
                                            const LshHashParams& params, int64_t batch,
                                            int64_t head, int first_token) {
  const int quad_lane = threadIdx.x % 4, head_dim = static_cast<int>(params.head_dim);
#pragma unroll
  for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
    const int64_t token = first_token + WarpTokens<kRowTiles>::token(slot);
    const uint16_t* x = static_cast<const uint16_t*>(params.x) + batch * params.x_stride_b +
                        head * params.x_stride_h + token * params.x_stride_l;
#pragma unroll
    for (int part = 0; part < kSteps / 2; ++part) {
      const int element = part * 32 + quad_lane * 8;
      tokens[slot][part] = make_uint4(0, 0, 0, 0);
      if (token < params.length && element < head_dim) {
        tokens[slot][part] = __ldg(reinterpret_cast<const uint4*>(x + element));
      }
    }
  }
}

template <int kRowTiles, int kSteps>
__device__ __forceinline__ void to_operands(uint32_t (&operands)[kRowTiles][kSteps][4],
                                            const uint4 (&tokens)[2 * kRowTiles][kSteps / 2]) {
#pragma unroll
  for (int part = 0; part < kSteps / 2; ++part) {
#pragma unroll
    for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
      const int half = slot % 2;
      operands[slot / 2][2 * part][half] = tokens[slot][part].x;
      operands[slot / 2][2 * part][half + 2] = tokens[slot][part].y;
      operands[slot / 2][2 * part + 1][half] = tokens[slot][part].z;
      operands[slot / 2][2 * part + 1][half + 2] = tokens[slot][part].w;
    }
  }
}

// ---- Search for the largest column

// 0.0f where the compiler cannot see it: see take_larger.
struct OpaqueZero {
  float value;
};

// if (|value| > |best.value|) best = {value, column}: strictly, so that the lowest of equal columns
// stays. The conditional moves are written as arithmetic, which the otherwise idle FMA pipe
// executes: the ALU pipe would be the bottleneck. Adding -0.0 keeps -0.0 too. Columns, not negative
// and below 2^23, are denormal numbers; that the new one formally depends on the old keeps ptxas
// from computing it once for many rows and selecting it, on the ALU pipe, for each.
__device__ __forceinline__ void take_larger(LargestColumn& best, float value, int column,
                                            OpaqueZero zero) {
  asm("{.reg .pred larger; .reg .f32 a, b, c;"
      " abs.f32 a, %2; abs.f32 b, %0; setp.gt.f32 larger, a, b; mov.b32 c, %1;"
      " @larger add.rn.f32 %0, %2, %5; @larger fma.rn.f32 c, c, %4, %3; mov.b32 %1, c;}"
      : "+f"(best.value), "+r"(best.column)
      : "f"(value), "f"(__int_as_float(column)), "f"(zero.value), "f"(-zero.value));
}

__device__ __forceinline__ LargestColumn larger(LargestColumn a, LargestColumn b) {
  const float x = fabsf(a.value), y = fabsf(b.value);
  return y > x || (y == x && b.column < a.column) ? b : a;
}

__device__ __forceinline__ LargestColumn from_lane_xor(LargestColumn best, int mask) {
  return {__shfl_xor_sync(0xffffffff, best.value, mask),
          __shfl_xor_sync(0xffffffff, best.column, mask)};
}

// Over two lanes: of kCount slots, the lane with the bit `mask` gets the upper half, the other one
// the lower half; of a single slot, both get it.
template <int kCount>
__device__ __forceinline__ void largest_of_two(LargestColumn* best, int mask) {
  if constexpr (kCount == 1) {
    best[0] = larger(best[0], from_lane_xor(best[0], mask));
  } else {
    const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const LargestColumn low = best[i], high = best[i + kCount / 2];
      best[i] = larger(upper ? high : low, from_lane_xor(upper ? low : high, mask));
    }
  }
}

// Over the four lanes that share kSlots slots. A lane's kept slots come first in `best`.
template <int kSlots>
__device__ __forceinline__ void largest_of_quad(LargestColumn (&best)[kSlots]) {
  largest_of_two<kSlots>(best, 2);
  largest_of_two<kSlots / 2>(best, 1);
}

// The state of a warp's search through one tile of tokens.
template <class Factors, int kRowTiles>
class Search {
 public:
  static constexpr int kChunk = Factors::kChunk;
  using Layout = WarpTokens<kRowTiles>;
  static constexpr int kSlots = Layout::kSlots, kKept = Layout::kKept;

  __device__ __forceinline__ Search(const LshHashParams& params, const HashColumns& columns,
                                    int64_t head, int first_round, int rounds, OpaqueZero zero)
      : params_(params),
        columns_(columns),
        head_(head),
        first_round_(first_round),
        rounds_(rounds),
        zero_(zero) {}

  __device__ __forceinline__ void start(int64_t batch, int first_token) {
    const int token = first_token + Layout::token(Layout::first_kept_slot());
    const int64_t sequence = batch * params_.heads + head_;
    buckets_ =
        params_.buckets + (sequence * params_.rounds + first_round_) * params_.length + token;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int64_t mine = token + i * Layout::kKeptStride;
      stores_[i] = Layout::is_first_keeper() && mine < params_.length;
      is_padding_[i] = stores_[i] && params_.key_padding_mask != nullptr &&
                       params_.key_padding_mask[batch * params_.length + mine];
      bucket_[i] = 0;
    }
    round_ = 0;
    if constexpr (!Factors::kStatic) {
      factor_ = first_column_ = chunk_column_ = 0;
      tiles_left_ = columns_.factors[0].tiles;
      begin_factor();
    }
  }

  // Takes the products with a tile of columns, the chunk's tile-th (known at compile time); stores
  // the buckets of the round that it completes.
  __device__ __forceinline__ void take(int tile, const float (*products)[4]) {
    if constexpr (Factors::kStatic) {
      const int first_tile = static_cast<int>(Factors::kFirstTile >> (4 * tile) & 15);
      take_columns((tile - first_tile) * kTileColumns, products, Factors::kBegins >> tile & 1);
      if (Factors::kEnds >> tile & 1) {
        finish_factor(Factors::kFactor >> (4 * tile) & 15, 0, Factors::kEndsRound >> tile & 1);
      }
    } else {
      const int column = chunk_column_ + tile * kTileColumns;
      take_columns(column, products, false);
      if (--tiles_left_ == 0) {
        const bool last = factor_ == columns_.n_factors - 1;
        finish_factor(factor_, first_column_, last);
        factor_ = last ? 0 : factor_ + 1;
        tiles_left_ = columns_.factors[factor_].tiles;
        first_column_ = column + kTileColumns;
        begin_factor();
      }
      if (tile == kChunk - 1) chunk_column_ += kChunk * kTileColumns;
    }
  }

 private:
  __device__ __forceinline__ void begin_factor() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) best_[slot] = {0.0f, first_column_};
  }

  __device__ __forceinline__ void take_columns(int column, const float (*products)[4],
                                               bool begins) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float* pair = products[slot / 2] + slot % 2 * 2;
      if (begins) {
        best_[slot] = {pair[0], column};
      } else {
        take_larger(best_[slot], pair[0], column, zero_);
      }
      take_larger(best_[slot], pair[1], column + 1, zero_);
    }
  }

  __device__ __forceinline__ void finish_factor(int index, int first_column, bool last) {
    const HashColumns::Factor& factor = columns_.factors[index];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      best_[slot].column += static_cast<int>(threadIdx.x % 4) * 2 - first_column;
    }
    largest_of_quad(best_);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      // NaN products may leave a padding column: any digit will do, but a digit.
      const int column = min(best_[i].column, factor.columns - 1);
      bucket_[i] += factor.place * (column + (best_[i].value < 0.0f ? factor.columns : 0));
    }
    if (!last) return;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (stores_[i] && round_ < rounds_) {
        buckets_[i * Layout::kKeptStride] = is_padding_[i] ? columns_.padding_bucket : bucket_[i];
      }
      bucket_[i] = 0;
    }
    buckets_ += params_.length;
    ++round_;
  }

  const LshHashParams& params_;
  const HashColumns& columns_;
  const int64_t head_;
  const int first_round_, rounds_;
  const OpaqueZero zero_;
  int32_t* buckets_;  // of this lane's first token in the current round
  bool stores_[kKept], is_padding_[kKept];
  int bucket_[kKept], round_;
  LargestColumn best_[kSlots];
  int factor_, tiles_left_, first_column_, chunk_column_;  // AnyFactors
};

}  // namespace reformer::kernels::packed_hash

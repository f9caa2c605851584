// What the tensor-core instances of the hash share on the device: tokens as A operands, and the
// search through the products, in registers, for the largest absolute value of each factor.
//
// A warp holds row tiles of 16 tokens. Their products with 8 columns are float[4] per thread and
// row tile, as mma.sync and wgmma give them: elements 2 * half and 2 * half + 1 are row
// lane / 4 + 8 * half at the columns 2 * (lane % 4) and one more.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lsh_hash/packed.h"

namespace reformer::kernels::packed_hash {

// ---- Tokens

// Four lanes share 2 * kRowTiles slots of a warp's tokens; slot 2 * i + half is row
// lane / 4 + 8 * half of row tile i. From the warp's first token:
__device__ __forceinline__ int token_of_slot(int slot) {
  return slot * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
}

// kSteps multiplies of depth 16.
template <int kRowTiles, int kSteps>
using Tokens = uint4[2 * kRowTiles][kSteps / 2];
template <int kRowTiles, int kSteps>
using Operands = uint32_t[kRowTiles][kSteps][4];

// The tokens of one batch and head.
struct Sequence {
  const uint16_t* rows;
  int64_t row_stride;
  int length, head_dim;

  __device__ __forceinline__ Sequence(const LshHashParams& params, int64_t batch, int64_t head)
      : rows(static_cast<const uint16_t*>(params.x) + batch * params.x_stride_b +
             head * params.x_stride_h),
        row_stride(params.x_stride_l),
        length(static_cast<int>(params.length)),
        head_dim(static_cast<int>(params.head_dim)) {}
};

// A thread's share of the warp's tokens; zeros beyond the end of the sequence.
template <int kRowTiles, int kSteps>
__device__ __forceinline__ void load_tokens(uint4 (&tokens)[2 * kRowTiles][kSteps / 2],
                                            const Sequence& sequence, int first_token) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
    const int token = first_token + token_of_slot(slot);
    const uint16_t* row = sequence.rows + token * sequence.row_stride;
#pragma unroll
    for (int part = 0; part < kSteps / 2; ++part) {
      const int element = part * 32 + quad_lane * 8;
      tokens[slot][part] = make_uint4(0, 0, 0, 0);
      if (token < sequence.length && element < sequence.head_dim) {
        tokens[slot][part] = __ldg(reinterpret_cast<const uint4*>(row + element));
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

// A warp's search through the columns for one tile of tokens. The columns of a factor come in whole
// units of kUnit tiles, kChunk tiles at a time; a lane searches one round of every kLaneRounds.
template <int kRowTiles, int kUnit, int kChunk>
class Search {
  static_assert(kChunk % kUnit == 0);

 public:
  __device__ __forceinline__ Search(const LshHashParams& params, const HashColumns& columns,
                                    int64_t batch, int64_t head, int first_round, int rounds,
                                    OpaqueZero zero)
      : columns_(columns),
        length_(static_cast<int>(params.length)),
        first_round_(first_round + static_cast<int>(threadIdx.x) % kLaneRounds),
        end_round_(first_round + rounds),
        zero_(zero),
        sequence_buckets_(params.buckets +
                          ((batch * params.heads + head) * params.rounds + first_round_) *
                              params.length),
        sequence_padding_(params.key_padding_mask == nullptr
                              ? nullptr
                              : params.key_padding_mask + batch * params.length) {}

  // Begins with the first columns for the warp's tokens from first_token on.
  __device__ __forceinline__ void start(int first_token) {
    token_ = first_token + token_of_slot(0);
    round_ = first_round_;
    buckets_ = sequence_buckets_ + token_;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) bucket_[slot] = 0;
    begin_factor(0);
  }

  // Takes the products with a tile of columns, the chunk's tile-th (known at compile time); stores
  // the buckets of the rounds that it completes.
  __device__ __forceinline__ void take(int tile, const float (*products)[4]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        take_larger(best_[slot], products[slot / 2][slot % 2 * 2 + i],
                    kFirst + tile % kUnit * kLaneColumns + i, zero_);
      }
    }
    if ((tile + 1) % kUnit != 0) return;
    tiles_left_ -= kUnit;
    if (tiles_left_ == 0) {
      finish_factor();
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) best_[slot].column -= kUnit * kLaneColumns;
    }
  }

 private:
  static constexpr int kSlots = 2 * kRowTiles;
  // Of a unit. So large that the columns of earlier units, counted from the current one's first,
  // are positive: shared memory does not hold as many.
  static constexpr int kFirst = 1024;

  __device__ __forceinline__ void begin_factor(int factor) {
    factor_ = factor;
    tiles_left_ = columns_.factors[factor].tiles;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) best_[slot] = {0.0f, kFirst};
  }

  __device__ __forceinline__ void finish_factor() {
    const HashColumns::Factor& factor = columns_.factors[factor_];
    const int first = kFirst - (factor.tiles - kUnit) * kLaneColumns;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int digit =
          best_[slot].column - first + (best_[slot].value < 0.0f ? factor.columns : 0);
      bucket_[slot] += factor.place * digit;
    }
    const bool last = factor_ == columns_.n_factors - 1;
    if (last) store();
    begin_factor(last ? 0 : factor_ + 1);
  }

  __device__ __forceinline__ void store() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int token = token_ + slot * 8;
      if (token < length_ && round_ < end_round_) {
        const bool is_padding = sequence_padding_ != nullptr && sequence_padding_[token];
        buckets_[slot * 8] = is_padding ? columns_.padding_bucket : bucket_[slot];
      }
      bucket_[slot] = 0;
    }
    buckets_ += kLaneRounds * int64_t{length_};
    round_ += kLaneRounds;
  }

  const HashColumns& columns_;
  const int length_, first_round_, end_round_;
  const OpaqueZero zero_;
  int32_t* const sequence_buckets_;  // of the lane's first round
  const bool* const sequence_padding_;
  int32_t* buckets_;  // of the lane's first token in its round
  int token_, round_, factor_, tiles_left_;
  int bucket_[kSlots];
  LargestColumn best_[kSlots];
};

// Calls f with the most tiles that the columns of every factor are whole units of, of 4, 2 and 1.
template <class Function>
auto with_unit(const HashColumns& columns, const Function& f) {
  int tiles = 0;
  for (int factor = 0; factor < columns.n_factors; ++factor) tiles |= columns.factors[factor].tiles;
  if (tiles % 4 == 0) return f(std::integral_constant<int, 4>{});
  if (tiles % 2 == 0) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

}  // namespace reformer::kernels::packed_hash

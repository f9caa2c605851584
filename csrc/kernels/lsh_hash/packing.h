// The rotations as the tensor-core instances of the hash keep them in shared memory.
//
// [rotation head][group of rounds][64 elements of D][column][64]: a column's row of 128 bytes in
// 16-byte pieces, piece p of column c at p ^ (c % 8), which suits wgmma and ldmatrix alike.
//
// Of the products with a tile of 8 columns, lane q of the four that share a token gets those with
// columns 2 q and 2 q + 1. These are two columns of the round 4 i + q: each lane searches a round
// of its own, and no result crosses lanes. A tile is thus two columns of each of four rounds; tiles
// stand in the order of HashColumns, padded with zeros to whole chunks.
//
// The elements of a row are permuted so that a thread's 16-byte loads of x are its A operands: lane
// q holds elements 8 q to 8 q + 7 of every 32, which serve as its columns 2 q, 2 q + 1, 2 q + 8 and
// 2 q + 9 of two multiplies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "lsh_hash/columns.h"

namespace reformer::kernels::packed_hash {

inline constexpr int kLaneRounds = 4;   // rounds searched side by side
inline constexpr int kLaneColumns = 2;  // of each of them in a tile
inline constexpr int kTileColumns = kLaneRounds * kLaneColumns;
inline constexpr int kRowBytes = 128;  // of one packed column: 64 elements

struct Packing {
  int halves;   // 64-element parts of D
  int columns;  // of a group of rounds, padded
  int rounds;   // of a group, a multiple of kLaneRounds
  int groups;

  REFORMER_HOST_DEVICE int64_t group_bytes() const { return int64_t{halves} * columns * kRowBytes; }
};

// Whether types, sizes and alignment of x and of the rotations are those of the tensor cores.
inline bool suits(const LshHashParams& params) {
  constexpr int64_t kMaxHeadDim = 256;
  constexpr int64_t kMinTokens = 16;   // of a tile
  constexpr int64_t kMaxTokens = 512;  // of a block's tiles and those it loads ahead
  const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
  if (params.x_dtype == DType::f32 || params.x_dtype != params.rotations_dtype ||
      params.head_dim > kMaxHeadDim || params.head_dim % 8 != 0 ||
      reinterpret_cast<uintptr_t>(params.x) % 16 != 0 || !aligned(params.x_stride_b) ||
      !aligned(params.x_stride_h) || !aligned(params.x_stride_l)) {
    return false;
  }
  const int64_t tiles = params.batch * params.heads * ceil_div<int64_t>(params.length, kMinTokens);
  return tiles <= INT32_MAX && params.length <= INT32_MAX - kMaxTokens;
}

// The columns as the packed tiles hold them.
inline HashColumns lane_columns(const LshHashParams& params) { return {params, kLaneColumns}; }

// Rounds go in groups, at least min_groups if there are rounds for as many, whose packed rotations
// fit into shared_memory bytes. rounds == 0: not even the smallest group fits.
inline Packing make_packing(const LshHashParams& params, const HashColumns& columns,
                            int chunk_tiles, int64_t shared_memory, int64_t min_groups = 1) {
  const int chunk_columns = kTileColumns * chunk_tiles;
  Packing packing{};
  packing.halves = params.head_dim <= 64 ? 1 : params.head_dim <= 128 ? 2 : 4;
  const int64_t fitting_columns =
      shared_memory / (packing.halves * kRowBytes) / chunk_columns * chunk_columns;
  const int64_t lap_columns = int64_t{columns.tiles_per_round} * kTileColumns;
  const int64_t laps = ceil_div<int64_t>(params.rounds, kLaneRounds);  // kLaneRounds rounds each
  const int64_t fitting_laps = std::min(fitting_columns / lap_columns, laps);
  if (fitting_laps == 0) return packing;
  const int64_t groups = std::max(ceil_div(laps, fitting_laps), std::min(min_groups, laps));
  const int64_t group_laps = ceil_div(laps, groups);
  packing.rounds = static_cast<int>(group_laps * kLaneRounds);
  packing.groups = static_cast<int>(ceil_div(laps, group_laps));
  packing.columns = static_cast<int>(round_up<int64_t>(group_laps * lap_columns, chunk_columns));
  return packing;
}

inline int64_t packed_bytes(const LshHashParams& params, const Packing& packing) {
  return params.rotation_heads * packing.groups * packing.group_bytes();
}

}  // namespace reformer::kernels::packed_hash

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

#include <cuda_runtime_api.h>

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

  __host__ __device__ int64_t group_bytes() const { return int64_t{halves} * columns * kRowBytes; }
};

// Whether types, sizes and alignment of x and of the rotations are those of the tensor cores.
bool suits(const LshHashParams& params);

// The columns as the packed tiles hold them.
inline HashColumns lane_columns(const LshHashParams& params) { return {params, kLaneColumns}; }

// Rounds go in groups, at least min_groups if there are rounds for as many, whose packed rotations
// fit into shared_memory bytes. rounds == 0: not even the smallest group fits.
Packing make_packing(const LshHashParams& params, const HashColumns& columns, int chunk_tiles,
                     int64_t shared_memory, int64_t min_groups = 1);

inline int64_t packed_bytes(const LshHashParams& params, const Packing& packing) {
  return params.rotation_heads * packing.groups * packing.group_bytes();
}

// Fills params.workspace, packed_bytes long.
cudaError_t pack_rotations(const LshHashParams& params, const HashColumns& columns,
                           const Packing& packing, cudaStream_t stream);

}  // namespace reformer::kernels::packed_hash

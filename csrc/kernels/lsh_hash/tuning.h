// What was chosen by measurement for the hash, on an H200 unless it says otherwise.
#pragma once

#include <cstdint>

namespace reformer::kernels::hash_tuning {

// Tokens of a head up to which each reads the rotations again, from L2: that is less than it costs
// the tensor cores' instances to pack them, three passes over them and a launch more.
inline constexpr int64_t kFewTokens = 8;
// Threads of a block of the direct instance, at most.
inline constexpr int kDirectThreads = 256;
// Tiles of columns that wgmma multiplies at once: the accumulators of more would spill.
inline constexpr int kWgmmaChunk = 8;
inline constexpr int kWgmmaAlignment = 1024;  // of its swizzled tiles
// Tiles of columns of an unrolled turn by mma.sync; even, since products alternate.
inline constexpr int kMmaSyncChunk = 4;

// D / 16, rounded up to what kernels are compiled for.
constexpr int steps_of(int64_t head_dim) {
  return head_dim <= 32 ? 2 : head_dim <= 64 ? 4 : head_dim <= 128 ? 8 : 16;
}
// mma.sync: row tiles of a warp, and the warps of a multiprocessor that their registers allow.
constexpr int mma_sync_row_tiles(int steps) { return steps <= 8 ? 2 : 1; }
constexpr int mma_sync_warps(int steps) { return steps <= 4 ? 16 : 12; }

}  // namespace reformer::kernels::hash_tuning

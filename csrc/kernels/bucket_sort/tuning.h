// What was chosen by measurement for the sort, on an H200.
#pragma once

#include <cstdint>

namespace reformer::kernels::sort {

// A cluster holds a segment: threads of a block, items of a thread at most, blocks (8 is the
// largest portable size).
inline constexpr int kClusterThreads = 1024, kMaxClusterItems = 32;
inline constexpr int kClusters[] = {1, 2, 3, 4, 8};
inline constexpr int kMaxClusterTile = kClusterThreads * kMaxClusterItems;
// A tile sorted by whole buckets: threads of a block, items of a thread.
inline constexpr int kTileThreads = 512, kTileItems = 32;
inline constexpr int kTile = kTileThreads * kTileItems;
inline constexpr int kMaxTileBuckets = 1 << 16;  // whose counters and items take 16 bits
// A tile sorted by a digit: a chunk of so many bytes for each thread, and 128 registers.
inline constexpr int kDigitThreads = 128;
inline constexpr int kDigitBlocks = 4;  // per multiprocessor
inline constexpr int kMaxDigitBits = 8;
inline constexpr int kChunkBytes = 256;
inline constexpr int kPackedTile = kDigitThreads * kChunkBytes / 4;  // of records of 32 bits
inline constexpr int kWideTile = kDigitThreads * kChunkBytes / 8;    // of 64 bits
inline constexpr int kRestBits = 11;  // of a packed record: what the first digit leaves of a bucket
// Segments are sorted in groups whose workspace fits this.
inline constexpr int64_t kWorkspaceTarget = int64_t{1} << 30;
// The choice of clusters: in items of one multiprocessor, what the start of a block costs, and the
// launches of the three kernels by tiles.
inline constexpr int64_t kBlockStart = 2048;
inline constexpr int64_t kLaunches = 6000;

}  // namespace reformer::kernels::sort

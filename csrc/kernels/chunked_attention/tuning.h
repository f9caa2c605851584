// What was chosen by measurement for chunked attention, on an H200. Constants of one kernel alone
// stand at its head: the registers and the shared memory of its blocks, its runs and rings.
#pragma once

namespace reformer::kernels::attention_tuning {

// The stages around the main kernels: threads of a block, and lanes that share a position's row in
// pieces of 16 bytes; the few where one piece each is a row.
inline constexpr int kStageThreads = 256;
inline constexpr int kFewLanes = 4, kManyLanes = 8;
// Rounds that combine loads before it uses any: the fewer, the more threads have room.
inline constexpr int kFewRounds = 4, kManyRounds = 8;

}  // namespace reformer::kernels::attention_tuning

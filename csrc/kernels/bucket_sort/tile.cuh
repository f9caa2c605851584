// Stable counting sort of one tile of a segment by a digit of many values (the bucket itself), in
// shared memory. A block
//
//   - ranks every item among its warp's items of the same digit, every warp counting for itself;
//   - sums each bin's counts over the warps: exclusive prefixes in place, and the block's total;
//   - scans the totals: a bin's first slot in the sorted tile, and the shift from there to the
//     segment's slot;
//   - moves the items to their slots in shared memory, and from there in order to global memory.
//
// Items are dealt to warps in contiguous runs and to lanes in steps of 32: rank order is input
// order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bucket_sort/plan.h"
#include "common/launch.cuh"

namespace reformer::kernels::sort {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// An array of 16-bit values, two to a register; indices must be known at compile time.
template <int kCount>
class PackedU16 {
 public:
  __device__ __forceinline__ uint32_t operator[](int i) const {
    return i % 2 == 0 ? words_[i / 2] & 0xffff : words_[i / 2] >> 16;
  }
  __device__ __forceinline__ void set(int i, uint32_t value) {
    uint32_t& word = words_[i / 2];
    word = i % 2 == 0 ? __byte_perm(word, value, 0x3254) : __byte_perm(word, value, 0x5410);
  }
  // The upper or the lower half of value.
  __device__ __forceinline__ void set_half(int i, uint32_t value, bool upper) {
    uint32_t& word = words_[i / 2];
    word = i % 2 == 0 ? __byte_perm(word, value, upper ? 0x3276 : 0x3254)
                      : __byte_perm(word, value, upper ? 0x7610 : 0x5410);
  }

 private:
  uint32_t words_[(kCount + 1) / 2] = {};
};

// ---- Ranks within a warp. counts: the warp's own counters, one per bin, kept up to date.

// Lanes seldom share one of many bins: count by atomics, whose order is arbitrary among the
// lanes that do share a bin; those are then ranked group by group.
__device__ __forceinline__ uint32_t rank_by_atomics(uint32_t* counts, uint32_t digit, bool valid) {
  const uint32_t before = (1u << (threadIdx.x % 32)) - 1;
  uint32_t* word = counts + digit / 2;
  const uint32_t offset = digit % 2 * 16;
  uint32_t rank = 0, counted = 1;
  if (valid) rank = (atomicAdd(word, 1u << offset) >> offset) & 0xffff;
  __syncwarp();
  if (valid) counted = (*word >> offset) & 0xffff;
  uint32_t shared = __ballot_sync(kAllLanes, valid && counted != rank + 1);
  while (shared != 0) {
    const uint32_t bin = __shfl_sync(kAllLanes, digit, __ffs(shared) - 1);
    const uint32_t group = __ballot_sync(kAllLanes, valid && digit == bin);
    if (valid && digit == bin) rank = counted - __popc(group) + __popc(group & before);
    shared &= ~group;
  }
  return rank;
}

// ---- Steps of the block

__device__ __forceinline__ void clear_counts(uint32_t* counts, const TileMemory& memory,
                                             int warps) {
  uint4* pieces = reinterpret_cast<uint4*>(counts);
  for (int i = threadIdx.x; i < warps * memory.counts_stride / 8; i += blockDim.x) {
    pieces[i] = make_uint4(0, 0, 0, 0);
  }
}

// Two bins at a time: a tile has fewer than 2^16 items, so the halves do not carry.
template <int kWarps>
__device__ __forceinline__ void prefix_over_warps(uint32_t* shared, const TileMemory& memory) {
  const int pairs = memory.counts_stride / 2;
  for (int pair = threadIdx.x; pair < pairs; pair += kWarps * 32) {
    uint32_t sum = 0;
#pragma unroll 8
    for (int warp = 0; warp < kWarps; ++warp) {
      const uint32_t count = shared[warp * pairs + pair];
      shared[warp * pairs + pair] = sum;
      sum += count;
    }
    shared[memory.totals + 2 * pair] = sum & 0xffff;
    shared[memory.totals + 2 * pair + 1] = sum >> 16;
  }
}

// Exclusive sums over the block's threads; adds the sum of all to `total`.
template <int kWarps>
__device__ __forceinline__ uint2 exclusive_scan(uint2 value, uint2& total, uint32_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2 inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t x = __shfl_up_sync(kAllLanes, inclusive.x, distance);
    const uint32_t y = __shfl_up_sync(kAllLanes, inclusive.y, distance);
    if (lane >= distance) {
      inclusive.x += x;
      inclusive.y += y;
    }
  }
  __syncthreads();  // the scratch of an earlier call has been read
  if (lane == 31) {
    scratch[warp] = inclusive.x;
    scratch[32 + warp] = inclusive.y;
  }
  __syncthreads();
  uint2 earlier = make_uint2(0, 0), all = make_uint2(0, 0);
  // Every warp sums the warps' totals for itself.
  const uint32_t x = lane < kWarps ? scratch[lane] : 0, y = lane < kWarps ? scratch[32 + lane] : 0;
  earlier.x = __reduce_add_sync(kAllLanes, lane < warp ? x : 0);
  earlier.y = __reduce_add_sync(kAllLanes, lane < warp ? y : 0);
  all.x = __reduce_add_sync(kAllLanes, x);
  all.y = __reduce_add_sync(kAllLanes, y);
  const uint2 result = make_uint2(total.x + earlier.x + inclusive.x - value.x,
                                  total.y + earlier.y + inclusive.y - value.y);
  total.x += all.x;
  total.y += all.y;
  return result;
}

// The items a block sorts: `count` of them, from `begin` on in the segment; `steps` per lane.
struct Tile {
  int64_t begin;
  int count, steps;

  __device__ int first_of_warp() const { return static_cast<int>(threadIdx.x / 32) * steps * 32; }
};

// Sorts one tile. Pass tells what an item is (input, key), its digit, the word that stands for it
// while staged (stage, digit_of) and where it goes (store). bin_starts(totals, starts, shifts)
// fills starts and shifts.
template <class Pass, int kThreads, int kItems, class BinStarts>
__device__ __forceinline__ void sort_tile(const Pass& pass, const Tile& tile, int bins,
                                          uint32_t* shared, const BinStarts& bin_starts) {
  constexpr int kWarps = kThreads / 32;
  using Word = typename Pass::Word;
  const TileMemory memory(kWarps, kThreads * kItems * static_cast<int>(sizeof(Word)), bins);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = tile.first_of_warp() + lane;
  uint16_t* counts = reinterpret_cast<uint16_t*>(shared) + warp * memory.counts_stride;

  clear_counts(shared, memory, kWarps);
  PackedU16<kItems> keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = first + 32 * i;
    keys.set(i, i < tile.steps && item < tile.count
                    ? pass.key(__ldg(pass.input + tile.begin + item), tile.begin + item)
                    : 0);
  }
  __syncthreads();

  PackedU16<kItems> ranks;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i >= tile.steps) break;
    const bool valid = first + 32 * i < tile.count;
    const uint32_t digit = pass.digit(keys[i]);
    ranks.set(i, rank_by_atomics(reinterpret_cast<uint32_t*>(counts), digit, valid));
  }
  __syncthreads();
  prefix_over_warps<kWarps>(shared, memory);
  bin_starts(shared + memory.totals, shared + memory.starts, shared + memory.shifts,
             shared + memory.scratch);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i >= tile.steps) break;
    const uint32_t digit = pass.digit(keys[i]);
    ranks.set(i, ranks[i] + counts[digit] + shared[memory.starts + digit]);
  }
  __syncthreads();  // the counters have been read
  Word* staged = reinterpret_cast<Word*>(shared);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = first + 32 * i;
    if (i < tile.steps && item < tile.count)
      staged[ranks[i]] = pass.stage(keys[i], tile.begin, item);
  }
  __syncthreads();
#pragma unroll 8
  for (int slot = threadIdx.x; slot < tile.count; slot += kThreads) {
    const Word word = staged[slot];
    pass.store(slot + shared[memory.shifts + pass.digit_of(word)], word, tile.begin);
  }
}

// ---- The pass: what is sorted, by which digit, into what. Pointers are the segment's.

// An out-of-range bucket counts as the nearest one in range.
__device__ __forceinline__ uint32_t clamp_bucket(int32_t bucket, int n_buckets) {
  return static_cast<uint32_t>(min(max(bucket, 0), n_buckets - 1));
}

// Buckets below 2^16 to positions in one pass; the digit is the bucket itself.
struct BucketsToOrder {
  using Input = int32_t;
  using Word = uint32_t;  // bucket, index in the tile (16 bits each)

  const int32_t* input;
  int32_t* order;
  int n_buckets;

  __device__ uint32_t key(int32_t bucket, int64_t) const { return clamp_bucket(bucket, n_buckets); }
  __device__ uint32_t digit(uint32_t bucket) const { return bucket; }
  __device__ Word stage(uint32_t bucket, int64_t, int item) const { return bucket << 16 | item; }
  __device__ uint32_t digit_of(Word word) const { return word >> 16; }
  __device__ void store(uint32_t slot, Word word, int64_t begin) const {
    order[slot] = static_cast<int32_t>(begin + (word & 0xffff));
  }
};

}  // namespace reformer::kernels::sort

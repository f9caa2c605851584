// Stable counting sort of one tile of a segment by one digit, in shared memory. A block
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

#include "launch.cuh"

namespace reformer::kernels::sort {

inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr int kScratchWords = 64;

// Where the parts of the dynamic shared memory begin, in 32-bit words.
struct TileMemory {
  int counts_stride;  // 16-bit counters per warp
  int totals, starts, shifts, scratch, end;

  __host__ __device__ TileMemory(int warps, int staged_bytes, int bins) {
    counts_stride = round_up(bins, 8);
    const int counts = warps * counts_stride / 2, staged = staged_bytes / 4;
    totals = counts > staged ? counts : staged;  // the staged items overwrite the counters
    starts = totals + counts_stride;
    shifts = starts + counts_stride;
    scratch = shifts + counts_stride;
    end = scratch + kScratchWords;
  }
  __host__ __device__ int bytes() const { return end * 4; }
};

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

 private:
  uint32_t words_[(kCount + 1) / 2] = {};
};

template <typename T, int kCount>
class Unpacked {
 public:
  __device__ __forceinline__ T operator[](int i) const { return values_[i]; }
  __device__ __forceinline__ void set(int i, T value) { values_[i] = value; }

 private:
  T values_[kCount];
};

// ---- Ranks within a warp. counts: the warp's own counters, one per bin, kept up to date.

// The lanes that hold the same digit of kMaxBits or fewer bits, by one ballot per bit.
template <int kMaxBits>
__device__ __forceinline__ uint32_t lanes_with_same_digit(uint32_t digit, int bits) {
  uint32_t same = kAllLanes;
#pragma unroll
  for (int bit = 0; bit < kMaxBits; ++bit) {
    if (bit >= bits) break;
    // Four instructions; plain C++ makes six.
    asm volatile(
        "{.reg .pred set; .reg .b32 vote;"
        " and.b32 vote, %1, %2; setp.ne.u32 set, vote, 0; vote.sync.ballot.b32 vote, set, "
        "0xffffffff;"
        " @!set not.b32 vote, vote; and.b32 %0, %0, vote;}"
        : "+r"(same)
        : "r"(digit), "r"(1u << bit));
  }
  return same;
}

__device__ __forceinline__ uint32_t rank_by_ballots(uint16_t* counts, uint32_t digit, int bits,
                                                    bool valid) {
  const uint32_t before = (1u << (threadIdx.x % 32)) - 1;
  const uint32_t same = lanes_with_same_digit<8>(digit, bits) & __ballot_sync(kAllLanes, valid);
  const uint32_t counted = valid ? counts[digit] : 0;
  __syncwarp();
  if (valid && (same & before) == 0) counts[digit] = static_cast<uint16_t>(counted + __popc(same));
  __syncwarp();
  return counted + __popc(same & before);
}

// For many bins, where lanes seldom share one: count by atomics, whose order is arbitrary among the
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

// Sorts one tile. Pass tells what an item is (load), its digit, the word that stands for it while
// staged (stage, digit_of) and where it goes (store). bin_starts(totals, starts, shifts) fills
// starts and shifts.
template <class Pass, int kThreads, int kItems, bool kBallots, class BinStarts>
__device__ __forceinline__ void sort_tile(const Pass& pass, const Tile& tile, int bins,
                                          uint32_t* shared, const BinStarts& bin_starts) {
  constexpr int kWarps = kThreads / 32;
  using Word = typename Pass::Word;
  const TileMemory memory(kWarps, kThreads * kItems * static_cast<int>(sizeof(Word)), bins);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = tile.first_of_warp() + lane;
  uint16_t* counts = reinterpret_cast<uint16_t*>(shared) + warp * memory.counts_stride;

  clear_counts(shared, memory, kWarps);
  typename Pass::template Keys<kItems> keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = first + 32 * i;
    keys.set(i, i < tile.steps && item < tile.count ? pass.load(tile.begin + item) : 0);
  }
  __syncthreads();

  PackedU16<kItems> ranks;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i >= tile.steps) break;
    const bool valid = first + 32 * i < tile.count;
    const uint32_t digit = pass.digit(keys[i]);
    ranks.set(i, kBallots ? rank_by_ballots(counts, digit, pass.digit_bits, valid)
                          : rank_by_atomics(reinterpret_cast<uint32_t*>(counts), digit, valid));
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

// ---- Passes: what is sorted, by which digit, into what. Pointers are the segment's.

// An out-of-range bucket counts as the nearest one in range.
__device__ __forceinline__ uint32_t load_bucket(const int32_t* buckets, int64_t i, int n_buckets) {
  return static_cast<uint32_t>(min(max(__ldg(buckets + i), 0), n_buckets - 1));
}

// Buckets below 2^16 to positions in one pass; the digit is the bucket itself.
struct BucketsToOrder {
  using Word = uint32_t;  // bucket, index in the tile (16 bits each)
  template <int kCount>
  using Keys = PackedU16<kCount>;

  const int32_t* buckets;
  int32_t* order;
  int n_buckets;
  static constexpr int digit_bits = 0;  // ranked by atomics

  __device__ uint32_t load(int64_t i) const { return load_bucket(buckets, i, n_buckets); }
  __device__ uint32_t digit(uint32_t bucket) const { return bucket; }
  __device__ Word stage(uint32_t bucket, int64_t, int item) const { return bucket << 16 | item; }
  __device__ uint32_t digit_of(Word word) const { return word >> 16; }
  __device__ void store(uint32_t slot, Word word, int64_t begin) const {
    order[slot] = static_cast<int32_t>(begin + (word & 0xffff));
  }
};

// First of two passes: buckets below 2^16 by their low digit to records: high digit (8 bits),
// position (24).
struct BucketsToPacked {
  using Word = uint32_t;
  template <int kCount>
  using Keys = PackedU16<kCount>;

  const int32_t* buckets;
  uint32_t* records;
  int n_buckets, digit_bits;

  __device__ uint32_t load(int64_t i) const { return load_bucket(buckets, i, n_buckets); }
  __device__ uint32_t digit(uint32_t bucket) const { return bucket & ((1u << digit_bits) - 1); }
  __device__ Word stage(uint32_t bucket, int64_t, int item) const { return bucket << 16 | item; }
  __device__ uint32_t digit_of(Word word) const { return digit(word >> 16); }
  __device__ void store(uint32_t slot, Word word, int64_t begin) const {
    const uint32_t high_digit = word >> 16 >> digit_bits;
    records[slot] = high_digit << 24 | static_cast<uint32_t>(begin + (word & 0xffff));
  }
};

// Second of two passes: by the high digit to positions.
struct PackedToOrder {
  using Word = uint32_t;
  template <int kCount>
  using Keys = Unpacked<uint32_t, kCount>;

  const uint32_t* records;
  int32_t* order;
  int digit_bits;

  __device__ uint32_t load(int64_t i) const { return __ldg(records + i); }
  __device__ uint32_t digit(uint32_t record) const { return record >> 24; }
  __device__ Word stage(uint32_t record, int64_t, int) const { return record; }
  __device__ uint32_t digit_of(Word word) const { return word >> 24; }
  __device__ void store(uint32_t slot, Word word, int64_t) const {
    order[slot] = static_cast<int32_t>(word & 0xffffff);
  }
};

// Any number of passes: records of bucket and position, 32 bits each. The first pass reads the
// buckets, the last one writes the positions.
template <bool kFirst, bool kLast>
struct WidePass {
  using Word = uint64_t;
  template <int kCount>
  using Keys = Unpacked<uint64_t, kCount>;

  const int32_t* buckets;
  const uint64_t* records_in;
  uint64_t* records_out;
  int32_t* order;
  int n_buckets, digit_shift, digit_bits;

  __device__ uint64_t load(int64_t i) const {
    if (!kFirst) return __ldg(reinterpret_cast<const unsigned long long*>(records_in) + i);
    return uint64_t{load_bucket(buckets, i, n_buckets)} << 32 | static_cast<uint32_t>(i);
  }
  __device__ uint32_t digit(uint64_t record) const {
    return static_cast<uint32_t>(record >> 32 >> digit_shift) & ((1u << digit_bits) - 1);
  }
  __device__ Word stage(uint64_t record, int64_t, int) const { return record; }
  __device__ uint32_t digit_of(Word word) const { return digit(word); }
  __device__ void store(uint32_t slot, Word word, int64_t) const {
    if (kLast) {
      order[slot] = static_cast<int32_t>(static_cast<uint32_t>(word));
    } else {
      records_out[slot] = word;
    }
  }
};

}  // namespace reformer::kernels::sort

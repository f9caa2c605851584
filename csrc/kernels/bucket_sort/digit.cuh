// Stable counting sort of one tile by a digit of few bits, which many of a warp's lanes share.
// There are no conflicts to resolve among them: every thread counts a run of consecutive items, its
// chunk, with counters of its own. A block
//
//   - copies the tile to shared memory, and chunks from there to registers;
//   - counts every chunk's digits;
//   - turns the counts, in place, into the chunk's first slot of the bin in the sorted tile;
//   - counts again: a counter now tells an item's slot;
//   - moves the items to their slots in shared memory, and from there in order to global memory.
//
// Two bins share a word of 16-bit counters, and a thread's words lie in a bank of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "bucket_sort/tile.cuh"
#include "tensor_core/mma.cuh"

namespace reformer::kernels::sort {

static_assert(1 << kMaxDigitBits <= 2 * kDigitThreads, "a thread looks after two bins");

template <class Pass>
inline constexpr int kChunkItems = kChunkBytes / static_cast<int>(sizeof(typename Pass::Word));
template <class Pass>
inline constexpr int kDigitTile = kDigitThreads * kChunkItems<Pass>;

// Staged items are spread by one in a chunk's worth, lest chunks of one bin meet in one bank.
template <class Pass>
__device__ __forceinline__ uint32_t staged_at(uint32_t slot) {
  return slot + slot / kChunkItems<Pass>;
}

// Where the parts of the dynamic shared memory begin, in 32-bit words. The first part holds the
// items as read, then the counters, then the staged items.
struct DigitMemory {
  int starts, shifts, scratch, end;

  __host__ __device__ explicit DigitMemory(int bins) {
    constexpr int kStaged = kDigitThreads * (kChunkBytes + 8) / 4;
    const int counts = bins / 2 * kDigitThreads;
    starts = counts > kStaged ? counts : kStaged;
    shifts = starts + bins / 2;
    scratch = shifts + bins;
    end = scratch + kScratchWords;
  }
  __host__ __device__ int bytes() const { return end * 4; }
};

// The chunk of the calling thread: the order in which scan_counts takes the threads' counters.
__device__ __forceinline__ int own_chunk() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return lane / 4 * 16 + warp * 4 + lane % 4;
}

// Item's place among the items as read: pieces of 16 bytes are permuted within a chunk so that the
// lanes' chunks begin in different banks.
template <class Pass>
__device__ __forceinline__ uint32_t read_at(uint32_t item) {
  constexpr uint32_t kPiece = 16 / sizeof(typename Pass::Input);
  const uint32_t chunk = item / kChunkItems<Pass>;
  return item ^ ((chunk & 3) | (chunk >> 2 & 4)) * kPiece;
}

template <class Pass, int kBytes>
__device__ __forceinline__ void read_tile(const typename Pass::Input* from, int count,
                                          typename Pass::Input* to) {
  constexpr int kItems = kBytes / static_cast<int>(sizeof(typename Pass::Input));
#pragma unroll 16
  for (int item = threadIdx.x * kItems; item < count; item += kDigitThreads * kItems) {
    copy_async<kBytes>(shared_address(to + read_at<Pass>(item)), from + item);
  }
}

// counts: rows (pairs of bins) of a word per thread. From counts to first slots; eight threads a
// row, each with four times four words. Halves do not carry: a tile has fewer than 2^16 items.
__device__ __forceinline__ void scan_counts(uint32_t* counts, const uint32_t* starts, int rows) {
  constexpr int kTeam = 8, kPieces = kDigitThreads / 4 / kTeam;
  const int member = threadIdx.x % kTeam;
  for (int first = 0; first < rows; first += kDigitThreads / kTeam) {
    const int row = first + threadIdx.x / kTeam;
    uint4* words = reinterpret_cast<uint4*>(counts + row * kDigitThreads) + member;
    uint4 sums[kPieces];
    uint32_t sum = 0;
    const auto take = [&](uint32_t& word) {
      const uint32_t count = word;
      word = sum;
      sum += count;
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      sums[i] = row < rows ? words[i * kTeam] : make_uint4(0, 0, 0, 0);
      take(sums[i].x);
      take(sums[i].y);
      take(sums[i].z);
      take(sums[i].w);
    }
    uint32_t before = sum;
#pragma unroll
    for (int distance = 1; distance < kTeam; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, before, distance, kTeam);
      if (member >= distance) before += other;
    }
    if (row >= rows) continue;
    before += starts[row] - sum;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      words[i * kTeam] = make_uint4(sums[i].x + before, sums[i].y + before, sums[i].z + before,
                                    sums[i].w + before);
    }
  }
}

// For the compiler, the value is another one from here on: it keeps nothing computed from it.
__device__ __forceinline__ void forget_uses(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void forget_uses(uint64_t& value) { asm volatile("" : "+l"(value)); }
template <typename T>
__device__ __forceinline__ void forget_uses(T*& value) {  // to global memory
  asm volatile("" : "+l"(value));
  __builtin_assume(__isGlobal(value));  // so that nothing in shared memory can be behind it
}

// Adds one to the counter of a digit; returns its word as it was. own: the shared address of the
// thread's first word.
__device__ __forceinline__ uint32_t count_one(uint32_t own, uint32_t digit) {
  uint32_t word;
  asm volatile(
      "{.reg .b32 address;"
      " mad.lo.u32 address, %1, %2, %3; atom.shared.add.u32 %0, [address], %4;}"
      : "=r"(word)
      : "r"(digit / 2), "n"(4 * kDigitThreads), "r"(own), "r"(digit % 2 != 0 ? 1u << 16 : 1u)
      : "memory");
  return word;
}

// slots: the first of the tile's slots in the segment, by bin, and after them the next tile's.
template <class Pass>
__device__ __forceinline__ void sort_tile_by_digit(Pass pass, int64_t begin, int count, int bins,
                                                   const uint32_t* slots, uint32_t* shared) {
  constexpr int kItems = kChunkItems<Pass>;
  using Input = typename Pass::Input;
  using Word = typename Pass::Word;
  struct alignas(16) Piece {
    Input items[16 / sizeof(Input)];
  };
  constexpr int kPiece = 16 / sizeof(Input);
  const DigitMemory memory(bins);
  const int rows = bins / 2, chunk = own_chunk();

  const Input* from = pass.input + begin;
  Input* read = reinterpret_cast<Input*>(shared);
  if ((reinterpret_cast<uintptr_t>(from) | count * sizeof(Input)) % 16 == 0) {
    read_tile<Pass, 16>(from, count, read);
  } else {
    read_tile<Pass, sizeof(Input)>(from, count, read);
  }

  // While the copies are under way: where the bins start.
  {
    const int row = threadIdx.x;
    uint2 first = make_uint2(0, 0), next = first, sum = first;
    if (row < rows) {
      first = reinterpret_cast<const uint2*>(slots)[row];
      next = reinterpret_cast<const uint2*>(slots + bins)[row];
    }
    const uint32_t even = next.x - first.x, both = even + next.y - first.y;
    const uint32_t start =
        exclusive_scan<kDigitThreads / 32>(make_uint2(both, 0), sum, shared + memory.scratch).x;
    if (row < rows) {
      shared[memory.starts + row] = start | (start + even) << 16;
      shared[memory.shifts + 2 * row] = first.x - start;
      shared[memory.shifts + 2 * row + 1] = first.y - start - even;
    }
  }
  wait_for_copies();
  __syncthreads();

  typename Pass::Key keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; i += kPiece) {
    const int item = chunk * kItems + i;
    const Piece piece = *reinterpret_cast<const Piece*>(read + read_at<Pass>(item));
#pragma unroll
    for (int j = 0; j < kPiece; ++j) keys[i + j] = pass.key(piece.items[j], begin + item + j);
  }
  // What is beyond the end of the segment sorts behind its last item, to slots nobody stores.
  const int held = count - chunk * kItems;
  if (held < kItems) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i >= held) keys[i] = pass.last_key();
    }
  }
  __syncthreads();

  uint4* pieces = reinterpret_cast<uint4*>(shared);
  for (int i = threadIdx.x; i < rows * kDigitThreads / 4; i += kDigitThreads) {
    pieces[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  const uint32_t own = shared_address(shared + threadIdx.x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) count_one(own, pass.digit(keys[i]));
  __syncthreads();
  scan_counts(shared, shared + memory.starts, rows);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kItems; ++i) forget_uses(keys[i]);  // or registers spill
  PackedU16<kItems> slot_of;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t digit = pass.digit(keys[i]);
    slot_of.set_half(i, count_one(own, digit), digit % 2 != 0);
  }
  __syncthreads();  // the counters have been read
  Word* staged = reinterpret_cast<Word*>(shared);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    staged[staged_at<Pass>(slot_of[i])] = pass.stage(keys[i], chunk * kItems + i);
  }
  __syncthreads();
  const uint32_t* shifts = shared + memory.shifts;
  staged += staged_at<Pass>(threadIdx.x);
  forget_uses(pass.output);  // or every store computes it anew
#pragma unroll 8
  for (int slot = threadIdx.x; slot < count; slot += kDigitThreads) {
    const Word word = *staged;
    pass.store(slot + shifts[pass.digit_of(word)], word, begin);
    staged += staged_at<Pass>(kDigitThreads);
  }
}

// ---- Passes: what is sorted, by which digit, into what. Pointers are the segment's.

// First of several passes: buckets, by their low digit, to records of what is left of the bucket
// and, below it, the position. Keys have the low digit in the highest byte and the rest in the
// lowest bits.
struct BucketsToPacked {
  using Input = int32_t;
  using Key = uint32_t;
  using Word = uint32_t;  // low digit (8 bits), index in the tile, rest

  const int32_t* input;
  uint32_t* output;
  int n_buckets, digit_bits, position_bits;

  __device__ Key key(int32_t bucket, int64_t) const {
    const uint32_t clamped = clamp_bucket(bucket, n_buckets);
    return (clamped & ((1u << digit_bits) - 1)) << 24 | clamped >> digit_bits;
  }
  __device__ Key last_key() const { return ((1u << digit_bits) - 1) << 24; }
  __device__ uint32_t digit(Key key) const { return key >> 24; }
  __device__ Word stage(Key key, uint32_t item) const { return key + (item << kRestBits); }
  __device__ uint32_t digit_of(Word word) const { return digit(word); }
  __device__ void store(uint32_t slot, Word word, int64_t begin) const {
    const uint32_t item = word << 8 >> (8 + kRestBits), rest = word & ((1u << kRestBits) - 1);
    output[slot] = (rest << position_bits) + item + static_cast<uint32_t>(begin);
  }
};
static_assert(kDigitTile<BucketsToPacked> <= 1 << (24 - kRestBits));

// The other passes: by a digit of these records, to records or, at last, to positions.
template <bool kLast>
struct PackedPass {
  using Input = uint32_t;
  using Key = uint32_t;
  using Word = uint32_t;
  using Output = std::conditional_t<kLast, int32_t, uint32_t>;

  const uint32_t* input;
  Output* output;
  int digit_shift, digit_bits, position_bits;

  __device__ Key key(uint32_t record, int64_t) const { return record; }
  __device__ Key last_key() const { return ~0u; }
  __device__ uint32_t digit(Key record) const {
    return record >> digit_shift & ((1u << digit_bits) - 1);
  }
  __device__ Word stage(Key record, uint32_t) const { return record; }
  __device__ uint32_t digit_of(Word word) const { return digit(word); }
  __device__ void store(uint32_t slot, Word word, int64_t) const {
    output[slot] = kLast ? word & ((1u << position_bits) - 1) : word;
  }
};

// Any number of passes: records of bucket and position, 32 bits each. The first pass reads the
// buckets, the last one writes the positions.
template <bool kFirst, bool kLast>
struct WidePass {
  using Input = std::conditional_t<kFirst, int32_t, unsigned long long>;
  using Key = uint64_t;
  using Word = uint64_t;
  using Output = std::conditional_t<kLast, int32_t, uint64_t>;

  const Input* input;
  Output* output;
  int n_buckets, digit_shift, digit_bits;

  __device__ Key key(Input item, int64_t i) const {
    if constexpr (!kFirst) return item;
    return uint64_t{clamp_bucket(static_cast<int32_t>(item), n_buckets)} << 32 |
           static_cast<uint32_t>(i);
  }
  __device__ Key last_key() const { return ~uint64_t{0}; }
  __device__ uint32_t digit(Key record) const {
    return static_cast<uint32_t>(record >> 32 >> digit_shift) & ((1u << digit_bits) - 1);
  }
  __device__ Word stage(Key record, uint32_t) const { return record; }
  __device__ uint32_t digit_of(Word word) const { return digit(word); }
  __device__ void store(uint32_t slot, Word word, int64_t) const {
    output[slot] = static_cast<Output>(kLast ? word & 0xffffffff : word);
  }
};

}  // namespace reformer::kernels::sort

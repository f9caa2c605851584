// Swizzled tiles in shared memory, for either tensor-core unit (wgmma.cuh, mma_tile.cuh): the
// copies that fill them and the fragment loads and stores around the units' products.
//
// A tile is 64 rows of 64 16-bit elements, one row per 128 bytes, 1024-byte aligned, in the
// 128-byte swizzle: the 16-byte piece p of row r lies at r * 128 + ((p ^ (r % 8)) * 16).
//
// An accumulator is float[columns / 8][4] per thread: element [j][2 * half + e] is
// row 16 * warp + lane / 4 + 8 * half, column 8 * j + 2 * (lane % 4) + e.
// Packed pairwise it is the A operand of a following multiply.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tensor_core/mma.cuh"

namespace reformer::kernels::tiled {

inline constexpr int kTileRows = 64;
inline constexpr int kTileBytes = 64 * 128;

// The thread's index, as a value the compiler believes new: what is computed from it is computed
// again rather than kept in registers across a loop whose tiles need them all.
__device__ __forceinline__ uint32_t renewed(uint32_t thread) {
  asm volatile("" : "+r"(thread));
  return thread;
}

template <int kColumns>
using AccumulatorOf = float[kColumns / 8][4];  // 64 rows, fp32
using Accumulator = AccumulatorOf<64>;
template <int kColumns>
using FragmentsOf = uint32_t[kColumns / 16][4];  // 64 rows, 16-bit, A operand: one [4] per K = 16
using Fragments = FragmentsOf<64>;

// base + index * bytes, in one instruction, which the compiler would take apart to hoist its parts.
template <typename T>
__device__ __forceinline__ T* indexed_address(const void* base, int index, int bytes) {
  T* address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "r"(bytes), "l"(base));
  return address;
}

// Byte offset of a row's 16-byte piece inside a tile.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) {
  return row * 128 + ((piece ^ (row % 8)) << 4);
}

// ---- Conversions

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
}

// 2^x; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -inf for 0.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// ---- Fragments

// Packs columns 8j .. 8j+7 of an accumulator-shaped tile into the A operand.
template <typename Element>
__device__ __forceinline__ void pack_columns(Fragments& fragments, int j, float v0, float v1,
                                             float v2, float v3) {
  fragments[j / 2][(j % 2) * 2] = pack<Element>(v0, v1);
  fragments[j / 2][(j % 2) * 2 + 1] = pack<Element>(v2, v3);
}

// Loads the warp's 16 rows of a tile, or of one and the one that follows, as A operands.
template <int kSteps>
__device__ __forceinline__ void load_fragments(uint32_t (&fragments)[kSteps][4], uint32_t tile,
                                               uint32_t thread) {
  const uint32_t lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    load_matrices(fragments[k], tile + k / 4 * kTileBytes + swizzled(row, 2 * (k % 4) + lane / 16));
  }
}

// ---- Reductions over the quad of lanes that shares a row

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// ---- Stores

// A store whose line is among the last to leave the L2 cache.
__device__ __forceinline__ void store_kept(float* destination, float value) {
  asm volatile(
      "{.reg .b64 policy; createpolicy.fractional.L2::evict_last.b64 policy, 1.0;"
      " st.global.L2::cache_hint.f32 [%0], %1, policy;}" ::"l"(destination),
      "f"(value)
      : "memory");
}

inline constexpr int kStagingBytes = 8 * 128;  // per warp

// Writes the warp's first `count` of 16 rows of a tile of kColumns columns to the rows at
// `positions`, kRowColumns elements each. Through the warp's staging memory, eight rows at a time,
// so that as many lanes as a row has pieces write it whole; streamed, as partial results are read
// once and much later.
template <typename Unit, int kColumns, int kRowColumns = kColumns>
__device__ __forceinline__ void store_rows(const AccumulatorOf<kColumns>& tile,
                                           typename Unit::Element* rows, const int* positions,
                                           int count, uint8_t* staging, uint32_t thread) {
  using Element = typename Unit::Element;
  // A lane writes two pieces, or one of 32 columns: rows four apart then share no bank.
  constexpr uint32_t kPieces = kColumns / 8;
  static_assert(kPieces == 8 || kPieces == 4);
  const uint32_t lane = thread % 32, piece = lane % kPieces;
  const uint32_t row = lane / 8 + lane % 8 / kPieces * 4;
  Element* const columns = rows + 8 * piece;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack<Element>(tile[j + i][2 * half], tile[j + i][2 * half + 1]);
      }
      Unit::store_pieces(shared_address(staging), j, words, lane);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < static_cast<int>(kPieces); i += 4) {
      const uint4 words = *reinterpret_cast<const uint4*>(staging + swizzled(i + row, piece));
      const int tile_row = 8 * half + i + static_cast<int>(row);
      uint4* destination =
          indexed_address<uint4>(columns, positions[tile_row], kRowColumns * sizeof(Element));
      if (tile_row < count) __stcs(destination, words);
    }
    __syncwarp();
  }
}

}  // namespace reformer::kernels::tiled

// The products of wgmma.cuh by mma.sync, sm_80 up: over the same tiles, accumulators and fragments,
// each warp its 16 rows. They are done when the call returns.
#pragma once

#include "tensor_core/mma.cuh"
#include "tensor_core/tile.cuh"

namespace reformer::kernels::tiled {

struct MmaTile {
  uint32_t address, thread;  // in shared memory; the calling thread's index
};

// The 16 x 16 block of rows 16 row_block, ... and columns 16 column_block, ... as four 8 x 8
// matrices: kAcross: first the two of its upper rows, else first the two of its left columns.
template <bool kAcross, bool kTransposed>
__device__ __forceinline__ void load_block(uint32_t (&x)[4], const MmaTile& tile,
                                           uint32_t row_block, uint32_t column_block) {
  const uint32_t lane = tile.thread % 32;
  const uint32_t row = kAcross ? lane / 16 * 8 + lane % 8 : lane % 16;
  const uint32_t piece = kAcross ? lane / 8 % 2 : lane / 16;
  // A tile's alignment lets the swizzle of a column block be applied to the whole address.
  const uint32_t address =
      ((tile.address + swizzled(row, piece)) ^ (column_block << 5)) + row_block * 16 * 128;
  if constexpr (kTransposed) {
    load_matrices_transposed(x, address);
  } else {
    load_matrices(x, address);
  }
}

// Of the k-th 16 columns; the ones past 64 are in the tile that follows.
__device__ __forceinline__ MmaTile tile_of_columns(const MmaTile& tile, int k) {
  return {tile.address + k / 4 * kTileBytes, tile.thread};
}

template <int kGroups>
__device__ __forceinline__ void clear(float (&d)[kGroups][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kGroups; ++i) d[i / 4][i % 4] = 0.0F;
}

// d += a B^T for the k-th 16 columns of B.
template <typename Element>
__device__ __forceinline__ void multiply_bt_k16(Accumulator& d, const uint32_t (&a)[4],
                                                const MmaTile& b, int k) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t x[4];
    load_block<true, false>(x, tile_of_columns(b, k), n, k % 4);
    mma_m16n8k16(d[2 * n], a, x[0], x[1], Element{});
    mma_m16n8k16(d[2 * n + 1], a, x[2], x[3], Element{});
  }
}

// d += a B for the k-th 16 rows of B.
template <typename Element, int kGroups>
__device__ __forceinline__ void multiply_b_k16(float (&d)[kGroups][4], const uint32_t (&a)[4],
                                               const MmaTile& b, int k) {
#pragma unroll
  for (int n = 0; n < kGroups / 2; ++n) {
    uint32_t x[4];
    load_block<false, true>(x, b, k, n);
    mma_m16n8k16(d[2 * n], a, x[0], x[1], Element{});
    mma_m16n8k16(d[2 * n + 1], a, x[2], x[3], Element{});
  }
}

// The counterpart of Wgmma. There is nothing to wait for.
template <typename T>
struct MmaSync {
  using Element = T;
  static constexpr bool kOperandsInRegisters = true;
  using Operand = MmaTile;
  static __device__ __forceinline__ Operand operand(const void* tile, uint32_t thread) {
    return {shared_address(tile), thread};
  }

  // d = A B^T, rows of A and of B along M and N.
  template <int kSteps>
  static __device__ __forceinline__ void multiply_abt(Accumulator& d, const MmaTile& a,
                                                      const MmaTile& b) {
    clear(d);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t rows[4];
      load_block<false, false>(rows, tile_of_columns(a, k), a.thread / 32, k % 4);
      multiply_bt_k16<Element>(d, rows, b, k);
    }
  }
  template <int kSteps>
  static __device__ __forceinline__ void multiply_abt(Accumulator& d,
                                                      const uint32_t (&a)[kSteps][4],
                                                      const MmaTile& b) {
    clear(d);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) multiply_bt_k16<Element>(d, a[k], b, k);
  }

  // d (+)= A B, rows of B along K.
  template <int kGroups>
  static __device__ __forceinline__ void multiply_ab(float (&d)[kGroups][4], const Fragments& a,
                                                     const MmaTile& b, bool accumulate) {
    if (!accumulate) clear(d);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_b_k16<Element>(d, a[k], b, k);
  }

  // d (+)= A^T B, rows of A and of B along K.
  template <int kGroups>
  static __device__ __forceinline__ void multiply_atb(float (&d)[kGroups][4], const MmaTile& a,
                                                      const MmaTile& b, bool accumulate) {
    if (!accumulate) clear(d);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t columns[4];
      load_block<true, true>(columns, a, k, a.thread / 32);
      multiply_b_k16<Element>(d, columns, b, k);
    }
  }

  static __device__ __forceinline__ void fence() {}
  template <int kPending>
  static __device__ __forceinline__ void wait() {}
  template <int kGroups>
  static __device__ __forceinline__ void pin(float (&)[kGroups][4]) {}
  static __device__ __forceinline__ void fence_shared() {}

  static __device__ __forceinline__ void copy_async_wait_and_sync() {
    wait_for_copies();
    __syncthreads();
  }

  static __device__ __forceinline__ void store_pieces(uint32_t rows, uint32_t first_piece,
                                                      const uint32_t (&words)[4], uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(rows + swizzled(lane / 4, first_piece + i) +
                                                   lane % 4 * 4),
                   "r"(words[i])
                   : "memory");
    }
  }
  static __device__ __forceinline__ void store_fragments(uint32_t tile, const Fragments& fragments,
                                                         uint32_t thread) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // by eight rows and half of the columns
      const uint32_t half = i / 2, k = i % 2 * 2;
      const uint32_t words[4] = {fragments[k][half], fragments[k][half + 2], fragments[k + 1][half],
                                 fragments[k + 1][half + 2]};
      store_pieces(tile + (thread / 32 * 16 + half * 8) * 128, 2 * k, words, thread % 32);
    }
  }
};

}  // namespace reformer::kernels::tiled

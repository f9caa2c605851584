// Hopper's warpgroup matrix multiply (wgmma) over the tiles of tile.cuh. Device code for sm_90a.
//
// The same tile can be read K-major (rows are M or N, columns are K) or MN-major (rows are K,
// columns are M or N).
#pragma once

#include "tensor_core/tile.cuh"

namespace reformer::kernels::tiled {

// Waits for this thread's copies, shows the block's shared-memory writes to wgmma, and
// synchronises.
__device__ __forceinline__ void copy_async_wait_and_sync() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// Orders this thread's ordinary shared-memory writes before later wgmma reads (a barrier follows).
__device__ __forceinline__ void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma

// Low word of the descriptor of a swizzled tile; add a step (below) per K = 16, or tile offsets
// / 16.
__device__ __forceinline__ uint32_t tile_descriptor(uint32_t address) {
  constexpr uint32_t kLeadingOffset = 64;  // ignored for swizzled tiles of one atom's width
  return ((address & 0x3ffff) >> 4) | (kLeadingOffset << 16);
}
inline constexpr uint32_t kStepKMajor = 32 >> 4;         // 16 columns
inline constexpr uint32_t kStepMnMajor = 16 * 128 >> 4;  // 16 rows

// From a K-major operand's first to its (k + 1)th 16 columns: the ones past 64 are in the tile that
// follows.
__device__ constexpr uint32_t k_major_step(int k) {
  return k / 4 * (kTileBytes >> 4) + k % 4 * kStepKMajor;
}

__device__ __forceinline__ uint64_t full_descriptor(uint32_t low) {
  constexpr uint32_t kHigh = (1u << 30) | (1024 >> 4);  // 128-byte swizzle, 8-row groups 1024 apart
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(kHigh));
  return descriptor;
}

// Before the first wgmma that reads registers (accumulators, A operands) written by other code.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Keeps the compiler from reading an accumulator before the wait that precedes this call.
template <int kGroups>
__device__ __forceinline__ void pin(float (&tile)[kGroups][4]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    asm volatile(""
                 : "+f"(tile[j][0]), "+f"(tile[j][1]), "+f"(tile[j][2]),
                   "+f"(tile[j][3])::"memory");
  }
}

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define REFORMER_OPERANDS_32(d)                                                                 \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),     \
      "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
      "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
#define REFORMER_OPERANDS_64(d)                                                                 \
  REFORMER_OPERANDS_32(d), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),          \
      "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), \
      "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define REFORMER_REGISTERS_32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define REFORMER_REGISTERS_64                                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24" \
  ",%25,%26,%27,%28,%29,%30,%31}"

// The operands after the accumulator's registers have numbers: A (or A's four registers), B,
// whether to accumulate, and what is transposed.
#define REFORMER_WGMMA_SHARED(n, type, a_, b_, p_, transposed_)                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " p_ ", 0; wgmma.mma_async.sync.aligned.m64n" #n    \
               "k16.f32." type "." type " " REFORMER_REGISTERS_##n ", " a_ ", " b_                \
                                                                   ", p, 1, 1, " transposed_ ";}" \
               : REFORMER_OPERANDS_##n(d)                                                         \
               : "l"(full_descriptor(a)), "l"(full_descriptor(b)),                                \
                 "r"(static_cast<int>(accumulate)), "n"(kATransposed), "n"(kBTransposed))
#define REFORMER_WGMMA_REGISTER(n, type, a_, b_, p_, transposed_)                                 \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " p_ ", 0; wgmma.mma_async.sync.aligned.m64n" #n    \
               "k16.f32." type "." type " " REFORMER_REGISTERS_##n ", " a_ ", " b_                \
                                                                   ", p, 1, 1, " transposed_ ";}" \
               : REFORMER_OPERANDS_##n(d)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(full_descriptor(b)),             \
                 "r"(static_cast<int>(accumulate)), "n"(kBTransposed))

// d (+)= A B for K = 16, A and B in shared memory; transposed: read MN-major.
template <typename Element, int kATransposed, int kBTransposed, int kGroups>
__device__ __forceinline__ void wgmma_k16(float (&d)[kGroups][4], uint32_t a, uint32_t b,
                                          bool accumulate) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kGroups == 4 || kGroups == 8);
  if constexpr (kGroups == 4) {
    if constexpr (kHalf) {
      REFORMER_WGMMA_SHARED(32, "f16", "%16", "%17", "%18", "%19, %20");
    } else {
      REFORMER_WGMMA_SHARED(32, "bf16", "%16", "%17", "%18", "%19, %20");
    }
  } else {
    if constexpr (kHalf) {
      REFORMER_WGMMA_SHARED(64, "f16", "%32", "%33", "%34", "%35, %36");
    } else {
      REFORMER_WGMMA_SHARED(64, "bf16", "%32", "%33", "%34", "%35, %36");
    }
  }
}

// The same with A in registers.
template <typename Element, int kBTransposed, int kGroups>
__device__ __forceinline__ void wgmma_k16(float (&d)[kGroups][4], const uint32_t (&a)[4],
                                          uint32_t b, bool accumulate) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kGroups == 4 || kGroups == 8);
  if constexpr (kGroups == 4) {
    if constexpr (kHalf) {
      REFORMER_WGMMA_REGISTER(32, "f16", "{%16,%17,%18,%19}", "%20", "%21", "%22");
    } else {
      REFORMER_WGMMA_REGISTER(32, "bf16", "{%16,%17,%18,%19}", "%20", "%21", "%22");
    }
  } else {
    if constexpr (kHalf) {
      REFORMER_WGMMA_REGISTER(64, "f16", "{%32,%33,%34,%35}", "%36", "%37", "%38");
    } else {
      REFORMER_WGMMA_REGISTER(64, "bf16", "{%32,%33,%34,%35}", "%36", "%37", "%38");
    }
  }
}

#undef REFORMER_WGMMA_REGISTER
#undef REFORMER_WGMMA_SHARED
#undef REFORMER_REGISTERS_64
#undef REFORMER_REGISTERS_32
#undef REFORMER_OPERANDS_64
#undef REFORMER_OPERANDS_32

// The products of tiles of 64 rows, issued as one committed group (K = kSteps * 16 where given).
// Operands are descriptors' low words, or fragments for A; the accumulator says how many columns.

// d = A B^T, rows of A and of B along M and N.
template <typename Element, int kSteps = 4>
__device__ __forceinline__ void multiply_abt(Accumulator& d, uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    wgmma_k16<Element, 0, 0>(d, a + k_major_step(k), b + k_major_step(k), k > 0);
  }
  wgmma_commit();
}
template <typename Element, int kSteps>
__device__ __forceinline__ void multiply_abt(Accumulator& d, const uint32_t (&a)[kSteps][4],
                                             uint32_t b) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma_k16<Element, 0>(d, a[k], b + k_major_step(k), k > 0);
  wgmma_commit();
}

// d (+)= A B, rows of B along K.
template <typename Element, int kGroups>
__device__ __forceinline__ void multiply_ab(float (&d)[kGroups][4], const Fragments& a, uint32_t b,
                                            bool accumulate) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma_k16<Element, 1>(d, a[k], b + k * kStepMnMajor, k > 0 || accumulate);
  }
  wgmma_commit();
}
template <typename Element, int kGroups>
__device__ __forceinline__ void multiply_ab(float (&d)[kGroups][4], uint32_t a, uint32_t b,
                                            bool accumulate) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma_k16<Element, 0, 1>(d, a + k_major_step(k), b + k * kStepMnMajor, k > 0 || accumulate);
  }
  wgmma_commit();
}

// d (+)= A^T B, rows of A and of B along K.
template <typename Element, int kGroups>
__device__ __forceinline__ void multiply_atb(float (&d)[kGroups][4], uint32_t a, uint32_t b,
                                             bool accumulate) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma_k16<Element, 1, 1>(d, a + k * kStepMnMajor, b + k * kStepMnMajor, k > 0 || accumulate);
  }
  wgmma_commit();
}

// ---- Stores

// Four 8 x 8 matrices to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Stores A operands as the warp's 16 rows of a tile.
__device__ __forceinline__ void store_fragments(uint32_t tile, const Fragments& fragments,
                                                uint32_t thread) {
  const uint32_t lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < 4; ++k) store_matrices(tile + swizzled(row, 2 * k + lane / 16), fragments[k]);
}

// The tensor cores as kernels for either unit use them; MmaSync is the other.
template <typename T>
struct Wgmma {
  using Element = T;
  static constexpr bool kOperandsInRegisters = false;  // true: and products are done on return
  using Operand = uint32_t;                            // a tile's descriptor
  static __device__ __forceinline__ Operand operand(const void* tile, uint32_t) {
    return tile_descriptor(shared_address(tile));
  }

  template <int kSteps>
  static __device__ __forceinline__ void multiply_abt(Accumulator& d, Operand a, Operand b) {
    tiled::multiply_abt<Element, kSteps>(d, a, b);
  }
  template <int kSteps>
  static __device__ __forceinline__ void multiply_abt(Accumulator& d,
                                                      const uint32_t (&a)[kSteps][4], Operand b) {
    tiled::multiply_abt<Element>(d, a, b);
  }
  template <int kGroups>
  static __device__ __forceinline__ void multiply_ab(float (&d)[kGroups][4], const Fragments& a,
                                                     Operand b, bool accumulate) {
    tiled::multiply_ab<Element>(d, a, b, accumulate);
  }
  template <int kGroups>
  static __device__ __forceinline__ void multiply_atb(float (&d)[kGroups][4], Operand a, Operand b,
                                                      bool accumulate) {
    tiled::multiply_atb<Element>(d, a, b, accumulate);
  }

  static __device__ __forceinline__ void fence() { wgmma_fence(); }
  template <int kPending>
  static __device__ __forceinline__ void wait() {
    wgmma_wait<kPending>();
  }
  template <int kGroups>
  static __device__ __forceinline__ void pin(float (&tile)[kGroups][4]) {
    tiled::pin(tile);
  }

  static __device__ __forceinline__ void copy_async_wait_and_sync() {
    tiled::copy_async_wait_and_sync();
  }
  static __device__ __forceinline__ void fence_shared() { fence_shared_for_wgmma(); }

  // Stores the warp's 16 rows of A operands in a tile.
  static __device__ __forceinline__ void store_fragments(uint32_t tile, const Fragments& fragments,
                                                         uint32_t thread) {
    tiled::store_fragments(tile, fragments, thread);
  }
  // Stores 8 x 8 matrices, held as accumulators pack, as the pieces of eight rows from first_piece
  // on.
  static __device__ __forceinline__ void store_pieces(uint32_t rows, uint32_t first_piece,
                                                      const uint32_t (&words)[4], uint32_t lane) {
    store_matrices(rows + swizzled(lane % 8, first_piece + lane / 8), words);
  }
};

}  // namespace reformer::kernels::tiled

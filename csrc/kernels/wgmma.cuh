// Hopper building blocks: warpgroup matrix multiply (wgmma) over swizzled shared-memory tiles, the
// copies that fill them and the fragment loads and stores around them. Device code for sm_90a.
//
// A tile is 64 rows of 64 16-bit elements, one row per 128 bytes, 1024-byte aligned, in the
// 128-byte swizzle: the 16-byte piece p of row r lies at r * 128 + ((p ^ (r % 8)) * 16). The same
// tile can be read K-major (rows are M or N, columns are K) or MN-major (rows are K, columns are M
// or N).
//
// An accumulator is float[columns / 8][4] per thread: element [j][2 * half + e] is
// row 16 * warp + lane / 4 + 8 * half, column 8 * j + 2 * (lane % 4) + e.
// Packed pairwise it is the A operand of a following multiply.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace reformer::kernels::sm90 {

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

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

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

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Asynchronous copies from global to shared memory

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(destination), "l"(source),
                 "n"(kBytes)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

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
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[k][0]), "=r"(fragments[k][1]), "=r"(fragments[k][2]),
                   "=r"(fragments[k][3])
                 : "r"(tile + k / 4 * kTileBytes + swizzled(row, 2 * (k % 4) + lane / 16))
                 : "memory");
  }
}

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

inline constexpr int kStagingBytes = 8 * 128;  // per warp

// Writes the warp's first `count` of 16 rows of a tile of kColumns columns to the rows at
// `positions`, kRowColumns elements each. Through the warp's staging memory, eight rows at a time,
// so that eight lanes write a whole row; streamed, as partial results are read once and much later.
template <typename Element, int kColumns, int kRowColumns = kColumns>
__device__ __forceinline__ void store_rows(const AccumulatorOf<kColumns>& tile, Element* rows,
                                           const int* positions, int count, uint8_t* staging,
                                           uint32_t thread) {
  const uint32_t lane = thread % 32, row = lane / 8, piece = lane % 8;
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
      store_matrices(shared_address(staging) + swizzled(lane % 8, j + lane / 8), words);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint4 words = *reinterpret_cast<const uint4*>(staging + swizzled(i + row, piece));
      const int tile_row = 8 * half + i + static_cast<int>(row);
      uint4* destination =
          indexed_address<uint4>(columns, positions[tile_row], kRowColumns * sizeof(Element));
      if (tile_row < count && piece * 8 < kColumns) __stcs(destination, words);
    }
    __syncwarp();
  }
}

}  // namespace reformer::kernels::sm90

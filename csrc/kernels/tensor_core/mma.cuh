// Tensor-core building blocks of the portable kernels (sm_80 up): asynchronous copies into shared
// memory and products of 16-row slabs, one warp each, by mma.sync with float accumulators.
//
// An accumulator is an array of 16 x 8 tiles. Lane 4 * group + member holds, of every tile, the
// rows group (elements 0, 1) and group + 8 (elements 2, 3) at the columns 2 * member and 2 * member
// + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace reformer::kernels {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 4, 8 or 16 bytes from global to shared memory without waiting.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// The same of 16 bytes; zeros where !valid (global is not read).
__device__ __forceinline__ void copy_async_or_zero(uint32_t shared, const void* global,
                                                   bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for the calling thread's own copies; a barrier then shows everybody's.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  load_matrices(x, static_cast<uint32_t>(__cvta_generic_to_shared(row)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  load_matrices_transposed(x, static_cast<uint32_t>(__cvta_generic_to_shared(row)));
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// How one warp multiplies a 16 x kDepth by a kDepth x 8 matrix of T; the general case is 16-bit.
// Tiles in shared memory are row-major with a row stride of 16 bytes more than a multiple of 64,
// which keeps every load here free of bank conflicts.
template <typename T>
struct Mma {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  // The 16 x kDepth block whose corner is `block`.
  static __device__ __forceinline__ A load_a(const T* block, int stride) {
    const int lane = threadIdx.x % 32;
    A a;
    load_matrices(a.x, block + (lane % 16) * stride + lane / 16 * 8);
    return a;
  }

  // Two B operands side by side, 16 columns, where column n is row n of the block.
  static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const T* block, int stride) {
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    load_matrices(x, block + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
  }

  // Two B operands side by side, 16 columns, to go with an A made by from_accumulator.
  static __device__ __forceinline__ void load_b(B (&b)[2], const T* block, int stride) {
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    load_matrices_transposed(x, block + (lane % 16) * stride + lane / 16 * 8);
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
  }

  // kDepth columns of an accumulator, rounded to T.
  static __device__ __forceinline__ A from_accumulator(const float (*tiles)[4]) {
    A a;
    a.x[0] = pack_pair(tiles[0][0], tiles[0][1], T{});
    a.x[1] = pack_pair(tiles[0][2], tiles[0][3], T{});
    a.x[2] = pack_pair(tiles[1][0], tiles[1][1], T{});
    a.x[3] = pack_pair(tiles[1][2], tiles[1][3], T{});
    return a;
  }

  static __device__ __forceinline__ void multiply_add(float (&c)[4], const A& a, const B& b) {
    mma_m16n8k16(c, a.x, b.x[0], b.x[1], T{});
  }
};

// float as the sum of two tf32 numbers, products to about 2^-21: three tf32 products for one.
template <>
struct Mma<float> {
  static constexpr int kDepth = 8;
  template <int kCount>
  struct Split {
    uint32_t high[kCount], low[kCount];

    __device__ __forceinline__ void set(int index, float x) {
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high[index]) : "f"(x));
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low[index]) : "f"(x - __uint_as_float(high[index])));
    }
  };
  using A = Split<4>;
  using B = Split<2>;

  static __device__ __forceinline__ A load_a(const float* block, int stride) {
    const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
    A a;
    a.set(0, block[group * stride + member]);
    a.set(1, block[(group + 8) * stride + member]);
    a.set(2, block[group * stride + member + 4]);
    a.set(3, block[(group + 8) * stride + member + 4]);
    return a;
  }

  static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const float* block,
                                                           int stride) {
    const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* row = block + (half * 8 + group) * stride;
      b[half].set(0, row[member]);
      b[half].set(1, row[member + 4]);
    }
  }

  // The order of summation is free as long as A and B agree: an accumulator holds columns 2 *
  // member and 2 * member + 1 where A wants member and member + 4, so those rows of the block are
  // taken.
  static __device__ __forceinline__ void load_b(B (&b)[2], const float* block, int stride) {
    const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* column = block + half * 8 + group;
      b[half].set(0, column[2 * member * stride]);
      b[half].set(1, column[(2 * member + 1) * stride]);
    }
  }
  static __device__ __forceinline__ A from_accumulator(const float (*tiles)[4]) {
    A a;
    a.set(0, tiles[0][0]);
    a.set(1, tiles[0][2]);
    a.set(2, tiles[0][1]);
    a.set(3, tiles[0][3]);
    return a;
  }

  static __device__ __forceinline__ void multiply_add(float (&c)[4], const A& a, const B& b) {
    mma_m16n8k8_tf32(c, a.low, b.high);
    mma_m16n8k8_tf32(c, a.high, b.low);
    mma_m16n8k8_tf32(c, a.high, b.high);
  }
};

// sum [16, kColumns] += a [16, kDepth] * b [kColumns, kDepth]^T, both in shared memory.
template <typename T, int kDepth, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kColumns / 8][4], const T* a,
                                                    const T* b, int stride) {
  constexpr int kStep = Mma<T>::kDepth;
#pragma unroll(kDepth / kStep <= 8 ? kDepth / kStep : 4)
  for (int depth = 0; depth < kDepth; depth += kStep) {
    const auto fragment_a = Mma<T>::load_a(a + depth, stride);
#pragma unroll
    for (int column = 0; column < kColumns; column += 16) {
      typename Mma<T>::B fragment_b[2];
      Mma<T>::load_b_transposed(fragment_b, b + column * stride + depth, stride);
      Mma<T>::multiply_add(sum[column / 8], fragment_a, fragment_b[0]);
      Mma<T>::multiply_add(sum[column / 8 + 1], fragment_a, fragment_b[1]);
    }
  }
}

// sum [16, kColumns] += a [16, kDepth] * b [kDepth, kColumns], a in registers, b in shared memory.
template <typename T, int kDepth, int kColumns>
__device__ __forceinline__ void multiply(float (&sum)[kColumns / 8][4],
                                         const float (&a)[kDepth / 8][4], const T* b, int stride) {
  constexpr int kStep = Mma<T>::kDepth;
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kStep) {
    const auto fragment_a = Mma<T>::from_accumulator(&a[depth / 8]);
#pragma unroll
    for (int column = 0; column < kColumns; column += 16) {
      typename Mma<T>::B fragment_b[2];
      Mma<T>::load_b(fragment_b, b + depth * stride + column, stride);
      Mma<T>::multiply_add(sum[column / 8], fragment_a, fragment_b[0]);
      Mma<T>::multiply_add(sum[column / 8 + 1], fragment_a, fragment_b[1]);
    }
  }
}

}  // namespace reformer::kernels

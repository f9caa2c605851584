// The hash of a few tokens, as in decoding, in one launch: a block takes one token and one round,
// and reads the rotations where they lie. Any sizes, types and device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "lsh_hash/columns.h"
#include "lsh_hash/instances.h"
#include "lsh_hash/plan.h"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace {

constexpr int kMaxThreads = hash_tuning::kDirectThreads;
constexpr int kDepthsAhead = 8;  // rows of the rotations that a thread loads at once
constexpr unsigned kAllLanes = 0xffffffffU;
static_assert(kMaxThreads / 32 >= kMaxHashFactors, "a warp for every factor");

__device__ __forceinline__ float element(const void* x, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(x)[index];
    case DType::f16:
      return to_float(static_cast<const __half*>(x)[index]);
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(x)[index]);
  }
  return 0.0f;
}

// The lowest of equal columns stays, and a NaN is never taken.
__device__ __forceinline__ void take_larger(LargestColumn& best, LargestColumn other) {
  const float x = fabsf(best.value), y = fabsf(other.value);
  if (y > x || (y == x && other.column < best.column)) best = other;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T x[kWidth];
};

// How the threads share a round's rotations [D, columns]: each has kWidth columns, and one of
// `slices` of D.
struct Split {
  int vectors, slices, threads;

  Split(const LshHashParams& params, const HashColumns& columns, int width) {
    vectors = columns.columns / width;
    const auto wanted = static_cast<int>(
        std::min<int64_t>(ceil_div<int64_t>(params.head_dim, kDepthsAhead), kMaxThreads));
    slices = std::clamp(kMaxThreads / vectors, 1, wanted);
    threads = std::min(kMaxThreads, round_up(slices * vectors, 32));
    threads = std::max(threads, 32 * columns.n_factors);
  }
};

template <typename T, int kWidth>
__global__ __launch_bounds__(kMaxThreads) void direct_kernel(
    const __grid_constant__ LshHashParams params, const __grid_constant__ HashColumns columns,
    const __grid_constant__ Split split) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ float x[];  // [D], then the sums [slices, columns]
  __shared__ int digits[kMaxHashFactors];
  float* const sums = x + params.head_dim;
  const int head_dim = static_cast<int>(params.head_dim);
  const int64_t round = blockIdx.x % params.rounds, row = blockIdx.x / params.rounds;
  const int64_t token = row % params.length, sequence = row / params.length;
  const int64_t batch = sequence / params.heads, head = sequence % params.heads;

  const int64_t first =
      batch * params.x_stride_b + head * params.x_stride_h + token * params.x_stride_l;
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
    x[d] = element(params.x, params.x_dtype, first + d);
  }
  __syncthreads();

  const int64_t row_stride = params.rounds * columns.columns;
  const T* rotations = static_cast<const T*>(params.rotations) +
                       (params.rotation_heads == 1 ? 0 : head) * head_dim * row_stride +
                       round * columns.columns;
  const int slice = threadIdx.x / split.vectors;
  for (int v = threadIdx.x % split.vectors; v < split.vectors && slice < split.slices;
       v += blockDim.x) {
    const T* const column = rotations + v * kWidth;
    float sum[kWidth] = {};
    for (int begin = slice; begin < head_dim; begin += kDepthsAhead * split.slices) {
      Vector<T, kWidth> ahead[kDepthsAhead];
#pragma unroll
      for (int i = 0; i < kDepthsAhead; ++i) {
        const int d = min(begin + i * split.slices, head_dim - 1);
        ahead[i] = *reinterpret_cast<const Vector<T, kWidth>*>(column + d * row_stride);
      }
#pragma unroll
      for (int i = 0; i < kDepthsAhead; ++i) {
        const int d = begin + i * split.slices;
        if (d >= head_dim) break;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] = fmaf(x[d], to_float(ahead[i].x[e]), sum[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums[slice * columns.columns + v * kWidth + e] = sum[e];
  }
  __syncthreads();

  const int f = threadIdx.x / 32;
  if (f < columns.n_factors) {  // a warp finds a digit
    const HashColumns::Factor& factor = columns.factors[f];
    LargestColumn best = {0.0f, 0};
    for (int c = threadIdx.x % 32; c < factor.columns; c += 32) {
      float product = 0.0f;
      for (int s = 0; s < split.slices; ++s) {
        product += sums[s * columns.columns + factor.first_column + c];
      }
      take_larger(best, {product, c});
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      take_larger(best, {__shfl_xor_sync(kAllLanes, best.value, offset),
                         __shfl_xor_sync(kAllLanes, best.column, offset)});
    }
    if (threadIdx.x % 32 == 0) {
      digits[f] = best.column + (best.value < 0.0f ? factor.columns : 0);
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int bucket = 0;
  for (int i = 0; i < columns.n_factors; ++i) bucket += columns.factors[i].place * digits[i];
  const bool is_padding =
      params.key_padding_mask != nullptr && params.key_padding_mask[batch * params.length + token];
  params.buckets[(sequence * params.rounds + round) * params.length + token] =
      is_padding ? columns.padding_bucket : bucket;
}

template <typename T>
cudaError_t launch(const LshHashParams& params, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const HashColumns columns(params, 1);
  const bool wide = columns.columns % kWide == 0 &&
                    reinterpret_cast<uintptr_t>(params.rotations) % sizeof(uint4) == 0;
  const Split split(params, columns, wide ? kWide : 1);
  const int64_t blocks = params.batch * params.heads * params.length * params.rounds;
  const int64_t floats = params.head_dim + split.slices * columns.columns;
  return launch_overlapped(
      wide ? direct_kernel<T, kWide> : direct_kernel<T, 1>,
      {static_cast<unsigned>(blocks), split.threads, floats * int64_t{sizeof(float)}}, stream,
      params, columns, split);
}

}  // namespace

bool lsh_hash_direct_supports(const LshHashParams& params) { return hash_direct_supports(params); }

cudaError_t lsh_hash_direct(const LshHashParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.rotations_dtype,
                        [&](auto x) { return launch<decltype(x)>(params, stream); });
}

}  // namespace reformer::kernels

// Bound by memory: every row is read once and every result written once. A thread takes 16 bytes of
// kRun consecutive rows of a head, all loaded before any is used; of the rows at the ends of a run,
// which two threads need, one finds them in the cache.
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "next_values.h"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRun = 4;
constexpr int kMixes = 3;  // previous, own, next

template <typename T>
__device__ __forceinline__ T* row_of(const ValueRows& rows, int64_t batch, int64_t head,
                                     int64_t position) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + batch * rows.stride_b +
         head * rows.stride_h + position * rows.stride_l;
}

// How the rows are dealt out. A block takes one head; the blocks of a tile's heads are neighbours,
// as the rows of a position usually are in memory.
struct Tiles {
  int pieces, rows_in_step;  // threads of a row; rows that a block's threads are at, at a time
  int64_t per_sequence;

  template <typename T>
  static __host__ __device__ Tiles of(const NextValuesParams& params, T) {
    const int pieces = static_cast<int>(params.head_dim) / Vector<T>::kWidth;
    const int rows = kThreads / pieces;
    return {pieces, rows, ceil_div(params.length, int64_t{rows} * kRun)};
  }
};

// The rows of a thread: positions first ... first + kRun - 1.
template <typename T>
struct Run {
  int64_t batch, head, tile, first;
  int element;  // of a row, where the thread's 16 bytes begin
  int count;    // of positions; 0: the thread has no work

  __device__ explicit Run(const NextValuesParams& params) {
    const Tiles tiles = Tiles::of(params, T{});
    const int64_t block = blockIdx.x;
    head = block % params.heads;
    tile = block / params.heads;  // through the batch
    batch = tile / tiles.per_sequence;
    const int row = static_cast<int>(threadIdx.x) / tiles.pieces;
    element = (static_cast<int>(threadIdx.x) - row * tiles.pieces) * Vector<T>::kWidth;
    first = ((tile - batch * tiles.per_sequence) * tiles.rows_in_step + row) * kRun;
    const int64_t left = params.length - first;
    count =
        row >= tiles.rows_in_step || left <= 0 ? 0 : static_cast<int>(left < kRun ? left : kRun);
  }

  // Bit i: position first - 1 + i exists and is no padding.
  __device__ __forceinline__ uint32_t real(const NextValuesParams& params) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kRun + 2; ++i) {
      const int64_t position = first - 1 + i;
      if (position < 0 || position >= params.length) continue;
      const bool padding = params.key_padding_mask != nullptr &&
                           params.key_padding_mask[batch * params.length + position];
      bits |= static_cast<uint32_t>(!padding) << i;
    }
    return bits;
  }

  // The thread's part of rows begin ... end - 1 of first - 1 ...; zeros beyond the ends.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void load(Vector<T> (&rows)[kRun + 2], const ValueRows& from,
                                       int64_t length) const {
    const T* const row = row_of<const T>(from, batch, head, first - 1) + element;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int64_t position = first - 1 + i;
      rows[i] = {};
      if (position >= 0 && position < length) {
        rows[i] = *reinterpret_cast<const Vector<T>*>(row + i * from.stride_l);
      }
    }
  }
};

struct Mix {
  float previous, own, next;

  __device__ Mix(const NextValuesParams& params, int64_t head) {
    const float* mix = params.value_mix + head;
    previous = params.causal ? 0 : *mix;
    if (!params.causal) mix += params.heads;
    own = mix[0];
    next = mix[params.heads];
  }
};

// centre x + ahead x_{+1} + behind x_{-1} of row i of a run. Neighbours that are not there are not
// multiplied: they may be anything.
template <typename T, bool kNext, bool kPrevious>
__device__ __forceinline__ Vector<T> sum_neighbours(const Vector<T> (&rows)[kRun + 2], int i,
                                                    uint32_t real, const Mix& mix, float ahead,
                                                    float behind) {
  const bool has_next = (real >> (i + 1) & 1) != 0, has_previous = (real >> (i - 1) & 1) != 0;
  const float centre =
      mix.own + (has_next ? 0.0F : mix.next) + (has_previous ? 0.0F : mix.previous);
  Vector<T> sum = {};
  if ((real >> i & 1) == 0) return sum;
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) {
    float x = centre * to_float(rows[i].x[e]);
    if (kNext && has_next) x = fmaf(ahead, to_float(rows[i + 1].x[e]), x);
    if (kPrevious && has_previous) x = fmaf(behind, to_float(rows[i - 1].x[e]), x);
    sum.x[e] = from_float<T>(x);
  }
  return sum;
}

// The gradient of a query that met only itself goes to its own value.
template <typename T>
__device__ __forceinline__ void add_own(Vector<T>& sum, const NextValuesBackwardParams& params,
                                        const Run<T>& run, int i) {
  const int64_t position = run.first + i;
  const int64_t head = run.batch * params.heads + run.head;
  if (params.lse[head * params.length + position] != params.self_only_lse) return;
  const T* const row = row_of<const T>(params.own_grad, run.batch, run.head, position);
  const auto own = *reinterpret_cast<const Vector<T>*>(row + run.element);
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) {
    sum.x[e] = from_float<T>(to_float(sum.x[e]) + to_float(own.x[e]));
  }
}

template <typename T>
__device__ __forceinline__ float dot(const Vector<T>& a, const Vector<T>& b) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) sum = fmaf(to_float(a.x[e]), to_float(b.x[e]), sum);
  return sum;
}

template <typename T, bool kCausal>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ NextValuesParams params) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Run<T> run(params);
  if (run.count == 0) return;
  Vector<T> v[kRun + 2];
  run.template load<kCausal ? 1 : 0, kRun + 2>(v, params.v, params.length);
  const uint32_t real = run.real(params);
  const Mix mix(params, run.head);
  T* const out = row_of<T>(params.out, run.batch, run.head, run.first) + run.element;
#pragma unroll
  for (int i = 1; i <= kRun; ++i) {
    if (i > run.count) break;
    *reinterpret_cast<Vector<T>*>(out + (i - 1) * params.out.stride_l) =
        sum_neighbours<T, true, !kCausal>(v, i, real, mix, mix.next, mix.previous);
  }
}

// The sum over the block's threads, in an order of its own; of use to thread 0. `parts` is of
// kWarps floats.
__device__ __forceinline__ float sum_block(float x, float* parts) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffU, x, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

// Writes grad_v, and the block's part of each factor's gradient: workspace [2 or 3][H][B * tiles].
template <typename T, bool kCausal>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ NextValuesBackwardParams params, int64_t tiles) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Run<T> run(params);
  float sums[kMixes] = {};
  if (run.count > 0) {
    Vector<T> v[kRun + 2], grad[kRun + 2];
    run.template load<0, kCausal ? kRun + 1 : kRun + 2>(grad, params.grad, params.length);
    run.template load<kCausal ? 1 : 0, kRun + 2>(v, params.v, params.length);
    const uint32_t real = run.real(params);
    const Mix mix(params, run.head);
    T* const grad_v = row_of<T>(params.grad_v, run.batch, run.head, run.first) + run.element;
#pragma unroll
    for (int i = 1; i <= kRun; ++i) {
      if (i > run.count) break;
      Vector<T> sum = sum_neighbours<T, !kCausal, true>(grad, i, real, mix, mix.previous, mix.next);
      if (params.lse != nullptr) add_own(sum, params, run, i - 1);
      *reinterpret_cast<Vector<T>*>(grad_v + (i - 1) * params.grad_v.stride_l) = sum;
      if ((real >> i & 1) == 0) continue;
      const float own = dot(grad[i], v[i]);
      sums[1] += own;
      sums[2] += (real >> (i + 1) & 1) != 0 ? dot(grad[i], v[i + 1]) : own;
      if (!kCausal) sums[0] += (real >> (i - 1) & 1) != 0 ? dot(grad[i], v[i - 1]) : own;
    }
  }
  constexpr int kFirst = kCausal ? 1 : 0;
  __shared__ float parts[kMixes][kWarps];
#pragma unroll
  for (int i = kFirst; i < kMixes; ++i) {
    const float sum = sum_block(sums[i], parts[i]);
    if (threadIdx.x != 0) continue;
    params.workspace[((i - kFirst) * params.heads + run.head) * tiles + run.tile] = sum;
  }
}

// A block adds up one factor's gradient.
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* parts, int64_t tiles, float* grad_value_mix) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  __shared__ float of_warps[kWarps];
  parts += blockIdx.x * tiles;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) sum += parts[i];
  sum = sum_block(sum, of_warps);
  if (threadIdx.x == 0) grad_value_mix[blockIdx.x] = sum;
}

bool is_valid(const NextValuesParams& params) {
  return params.batch > 0 && params.heads > 0 && params.length > 0 && params.head_dim > 0 &&
         params.head_dim % 8 == 0 && params.head_dim <= 256;
}

// launch(element, causal, tiles of all sequences)
template <typename Launch>
cudaError_t dispatch(const NextValuesParams& params, const Launch& launch) {
  if (!is_valid(params)) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto element) {
    const int64_t tiles = params.batch * Tiles::of(params, element).per_sequence;
    if (tiles > INT32_MAX / params.heads) return cudaErrorInvalidValue;
    return params.causal ? launch(element, std::true_type{}, tiles)
                         : launch(element, std::false_type{}, tiles);
  });
}

}  // namespace

int64_t next_values_backward_workspace(const NextValuesBackwardParams& params) {
  int64_t parts = 0;
  dispatch(params, [&](auto, auto, int64_t tiles) {
    parts = (params.causal ? 2 : kMixes) * params.heads * tiles;
    return cudaSuccess;
  });
  return parts * static_cast<int64_t>(sizeof(float));
}

cudaError_t next_values_forward(const NextValuesParams& params, cudaStream_t stream) {
  return dispatch(params, [&](auto element, auto causal, int64_t tiles) {
    const dim3 grid(static_cast<unsigned>(tiles * params.heads));
    return launch_overlapped(forward_kernel<decltype(element), causal()>, {grid, kThreads}, stream,
                             params);
  });
}

cudaError_t next_values_backward(const NextValuesBackwardParams& params, cudaStream_t stream) {
  return dispatch(params, [&](auto element, auto causal, int64_t tiles) {
    const dim3 grid(static_cast<unsigned>(tiles * params.heads));
    const cudaError_t error = launch_overlapped(backward_kernel<decltype(element), causal()>,
                                                {grid, kThreads}, stream, params, tiles);
    if (error != cudaSuccess) return error;
    const dim3 factors(static_cast<unsigned>((causal() ? 2 : kMixes) * params.heads));
    return launch_overlapped(add_parts_kernel, {factors, kThreads}, stream, params.workspace, tiles,
                             params.grad_value_mix);
  });
}

}  // namespace reformer::kernels

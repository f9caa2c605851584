#include <algorithm>

#include "apply_rotary.h"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace {

constexpr int kMaxThreads = 256;

template <typename T>
__device__ __forceinline__ T* row_of(const RotaryRows& rows, int64_t batch, int64_t head,
                                     int64_t token) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + batch * rows.stride_b +
         head * rows.stride_h + token * rows.stride_l;
}

template <typename T>
__device__ __forceinline__ Vector<T>& vector_at(T* row, int element) {
  return *reinterpret_cast<Vector<T>*>(row + element);
}

template <int kWidth>
__device__ __forceinline__ const Vector<float, kWidth>& factors_at(const float* row, int element) {
  return *reinterpret_cast<const Vector<float, kWidth>*>(row + element);
}

// A block takes all rows of one token, a thread one vector of a row's lower half and its partner.
template <typename T>
__global__ __launch_bounds__(kMaxThreads) void rotary_kernel(
    const __grid_constant__ ApplyRotaryParams params) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t batch = blockIdx.x / params.length, token = blockIdx.x % params.length;
  const float* cos = params.cos + batch * params.cos_stride_b + token * params.cos_stride_l;
  const float* sin = params.sin + batch * params.sin_stride_b + token * params.sin_stride_l;
  const int half = static_cast<int>(params.head_dim) / 2, vectors = half / kWidth;
  const int heads = static_cast<int>(params.heads);
  const int total = static_cast<int>(params.parts) * heads * vectors;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int row = i / vectors, d = (i - row * vectors) * kWidth;
    const int part = row / heads, head = row - part * heads;
    T* const from = row_of<T>(params.from[part], batch, head, token);
    T* const to = row_of<T>(params.to[part], batch, head, token);
    const Vector<T> low = vector_at(from, d), high = vector_at(from, d + half);
    if (part >= params.turned) {
      vector_at(to, d) = low;
      vector_at(to, d + half) = high;
      continue;
    }
    const Vector<float, kWidth> cos_low = factors_at<kWidth>(cos, d),
                                cos_high = factors_at<kWidth>(cos, d + half),
                                sin_low = factors_at<kWidth>(sin, d),
                                sin_high = factors_at<kWidth>(sin, d + half);
    Vector<T> turned_low, turned_high;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float a = to_float(low.x[e]), b = to_float(high.x[e]);
      turned_low.x[e] = from_float<T>(fmaf(b, sin_low.x[e], a * cos_low.x[e]));
      turned_high.x[e] = from_float<T>(fmaf(a, sin_high.x[e], b * cos_high.x[e]));
    }
    vector_at(to, d) = turned_low;
    vector_at(to, d + half) = turned_high;
  }
}

template <typename T>
cudaError_t launch(const ApplyRotaryParams& params, cudaStream_t stream) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t vectors = params.parts * params.heads * (params.head_dim / 2 / kWidth);
  const int64_t blocks = params.batch * params.length;
  if (params.head_dim % (2 * kWidth) != 0 || vectors > INT32_MAX - kMaxThreads ||
      blocks > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const int threads =
      static_cast<int>(std::min<int64_t>(kMaxThreads, round_up<int64_t>(vectors, 32)));
  return launch_overlapped(rotary_kernel<T>, {static_cast<unsigned>(blocks), threads}, stream,
                           params);
}

}  // namespace

cudaError_t apply_rotary(const ApplyRotaryParams& params, cudaStream_t stream) {
  if (params.parts * params.batch * params.heads * params.length * params.head_dim == 0) {
    return cudaSuccess;
  }
  return dispatch_dtype(params.dtype, [&](auto x) { return launch<decltype(x)>(params, stream); });
}

}  // namespace reformer::kernels

// Entry points of chunked attention, and the stages around the main kernels. All of these stages
// are bound by memory: four or eight lanes share a position and move its row in pieces of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "chunked_attention.h"
#include "chunked_attention/stages.h"
#include "chunked_attention/tuning.h"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
using namespace attention_tuning;
constexpr int kThreads = kStageThreads;

using Words = uint4;  // 16 bytes of a row, as loaded

// Loads what is read once.
template <typename T>
__device__ __forceinline__ Words load_streamed(const T* row) {
  return __ldcs(reinterpret_cast<const Words*>(row));
}

// 16 bytes of a row, as floats.
template <typename T>
struct Piece {
  static constexpr int kSize = 16 / sizeof(T);
  float x[kSize];

  __device__ __forceinline__ Piece() : x{} {}
  __device__ __forceinline__ explicit Piece(const Words& words) {
    alignas(16) T values[kSize];
    *reinterpret_cast<Words*>(values) = words;
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = to_float(values[i]);
  }
  __device__ __forceinline__ explicit Piece(const T* row)
      : Piece(*reinterpret_cast<const Words*>(row)) {}
  __device__ __forceinline__ void store(T* row) const {
    alignas(16) T values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = from_float<T>(x[i]);
    *reinterpret_cast<uint4*>(row) = *reinterpret_cast<const uint4*>(values);
  }
  __device__ __forceinline__ void add(const Piece& other, float factor = 1) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] += factor * other.x[i];
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] *= factor;
  }
  __device__ __forceinline__ bool is_zero() const {
    bool zero = true;
#pragma unroll
    for (int i = 0; i < kSize; ++i) zero &= x[i] == 0;
    return zero;
  }
  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kSize; ++i) finite &= fabsf(x[i]) <= FLT_MAX;
    return finite;
  }
  __device__ __forceinline__ float dot(const Piece& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += x[i] * other.x[i];
    return sum;
  }
};

// The sum over the lanes of a position.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffU, x, offset);
  return x;
}

// Whether it is true in any lane of a position.
template <int kLanes>
__device__ __forceinline__ bool any_lane(bool x) {
  return sum_lanes<kLanes>(x ? 1.0F : 0.0F) != 0;
}

// The position kLanes lanes work on: a block's are of one head, blockIdx.y of the group. Lanes
// beyond the last position repeat it, so that shuffles stay whole.
template <int kLanes>
struct Position {
  int64_t index;  // within the group: head * L + l
  int64_t head, l, batch, head_in_batch;
  int lane;
  bool real;

  __device__ Position(const ChunkedAttentionParams& params, int64_t head_begin) {
    const int64_t begin = int64_t{blockIdx.x} * (kThreads / kLanes);
    l = begin + threadIdx.x / kLanes;
    real = l < params.length;
    if (!real) l = params.length - 1;
    lane = static_cast<int>(threadIdx.x % kLanes);
    head = blockIdx.y;
    index = head * params.length + l;
    batch = (head_begin + head) / params.heads;
    head_in_batch = (head_begin + head) % params.heads;
  }

  template <typename T>
  __device__ __forceinline__ T* head_rows(const HeadsView& view) const {
    return static_cast<T*>(view.data) + batch * view.stride_b + head_in_batch * view.stride_h;
  }
  template <typename T>
  __device__ __forceinline__ T* row(const HeadsView& view) const {
    return head_rows<T>(view) + l * view.stride_l;
  }

  // A row of [head_count, R, L, D], and the step to the next round's.
  template <typename T>
  __device__ __forceinline__ const T* partial(const void* data,
                                              const ChunkedAttentionParams& params) const {
    return static_cast<const T*>(data) +
           (head * params.rounds * params.length + l) * params.head_dim;
  }

  __device__ __forceinline__ bool is_padding(const ChunkedAttentionParams& params) const {
    return params.key_padding_mask != nullptr && params.key_padding_mask[batch * params.length + l];
  }
};

__device__ __forceinline__ float key_scale_of(float squared_norm) {
  const float norm = sqrtf(squared_norm);
  return 1 / (norm < kMinKeyNorm ? kMinKeyNorm : norm);  // NaN stays NaN
}

template <typename T, int kLanes>
__global__ void key_scale_kernel(const __grid_constant__ ChunkedAttentionParams params,
                                 int64_t head_begin, float* key_scale) {
  wait_for_previous_kernel();
  const Position<kLanes> position(params, head_begin);
  const T* q = position.template row<T>(params.q);
  float square = 0;
  for (int d = position.lane * Piece<T>::kSize; d < params.head_dim;
       d += kLanes * Piece<T>::kSize) {
    const Piece<T> piece(q + d);
    square += piece.dot(piece);
  }
  const float scale = key_scale_of(sum_lanes<kLanes>(square));
  if (position.real && position.lane == 0) key_scale[position.index] = scale;
}

// chunk_numbers[head, l, round]: the chunk of its round in which position l stands.
__global__ void chunk_numbers_kernel(const __grid_constant__ ChunkedAttentionParams params,
                                     int64_t head_begin, int32_t* chunk_numbers) {
  wait_for_previous_kernel();
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= params.length) return;
  const int64_t rows = params.rounds * params.length, head = blockIdx.y;
  const int32_t* order = params.order + (head_begin + head) * rows + slot;
  const auto chunk = static_cast<int32_t>(slot / params.chunk_size);
#pragma unroll 8
  for (int64_t round = 0; round < params.rounds; ++round) {
    const int64_t token = order[round * params.length];
    const int64_t l = token < 0 ? 0 : token < params.length ? token : params.length - 1;
    chunk_numbers[head * rows + l * params.rounds + round] = chunk;
  }
}

// out = sum of the rounds' outputs weighted by exp(their lse - the total lse). Rounds are taken in
// batches, each loaded before any of it is used, with weights relative to the largest lse so far.
template <typename T, int kLanes, int kBatch>
__global__ void __launch_bounds__(kThreads, kBatch == kFewRounds ? 5 : 3)
    combine_kernel(const __grid_constant__ ChunkedAttentionParams params,
                   const __grid_constant__ ForwardStage stage) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Position<kLanes> position(params, stage.head_begin);
  if (!position.real) return;
  const int rounds = static_cast<int>(params.rounds), head_dim = static_cast<int>(params.head_dim);
  const float* partial_lse =
      stage.partial_lse + position.head * rounds * params.length + position.l;
  const T* partial_out = position.template partial<T>(stage.partial_out, params);
  const int64_t stride = params.length * head_dim;

  for (int d = position.lane * Piece<T>::kSize; d < head_dim; d += kLanes * Piece<T>::kSize) {
    Piece<T> row;
    float peak = -INFINITY, sum = 0;
    for (int begin = 0; begin < rounds; begin += kBatch) {
      float lse[kBatch];
      Words words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t round = begin + i;
        lse[i] = round < rounds ? __ldcs(partial_lse + round * params.length) : -INFINITY;
        words[i] = round < rounds ? load_streamed(partial_out + round * stride + d) : Words{};
      }
      float new_peak = peak;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) new_peak = fmaxf(new_peak, lse[i]);
      if (new_peak != -INFINITY) {
        const float rescale = exp2f(peak - new_peak);
        sum *= rescale;
        row.scale(rescale);
      }
      peak = new_peak;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (lse[i] == -INFINITY) continue;  // a NaN goes on, into the sum
        const float weight = exp2f(lse[i] - peak);
        sum += weight;
        row.add(Piece<T>(words[i]), weight);
      }
    }
    const bool has_key = sum != 0;
    const bool self_only = !has_key && params.mask_self && !position.is_padding(params);
    if (has_key) {
      row.scale(1 / sum);
    } else if (self_only) {
      row = Piece<T>(position.template row<T>(params.own_values) + d);
    }
    row.store(position.template row<T>(params.out) + d);
    if (d == 0) {
      params.lse[stage.head_begin * params.length + position.index] =
          self_only ? kSelfOnlyLse
          : has_key ? stored_lse((peak + log2f(sum)) * kLn2)
                    : -INFINITY;
    }
  }
}

template <typename T, int kLanes>
__global__ void row_stats_kernel(const __grid_constant__ ChunkedAttentionBackwardParams params,
                                 int64_t head_begin, RowStats* row_stats) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Position<kLanes> position(params, head_begin);
  const int head_dim = static_cast<int>(params.head_dim);
  const bool shared_qk = params.k.data == nullptr;
  const T* grad_out = position.template row<T>(params.grad_out);
  const T* out = position.template row<T>(params.out);
  const T* q = position.template row<T>(params.q);
  const int64_t row = head_begin * params.length + position.index;
  const float lse = params.lse[row];
  const float grad_lse = params.grad_lse == nullptr ? 0 : params.grad_lse[row];
  const bool is_padding = position.is_padding(params);

  float delta = 0, square = 0;
  bool has_cotangent = grad_lse != 0, spoilt = false;
  for (int d = position.lane * Piece<T>::kSize; d < head_dim; d += kLanes * Piece<T>::kSize) {
    const Piece<T> grad_out_piece(grad_out + d), out_piece(out + d);
    const Piece<T> q_piece = shared_qk ? Piece<T>(q + d) : Piece<T>();
    delta += grad_out_piece.dot(out_piece);
    square += q_piece.dot(q_piece);
    has_cotangent |= !grad_out_piece.is_zero();
    if (shared_qk && is_padding) {
      const Piece<T> v_piece(position.template row<T>(params.v) + d);
      spoilt |= !(q_piece.is_finite() && v_piece.is_finite() && grad_out_piece.is_finite());
    }
  }
  has_cotangent = any_lane<kLanes>(has_cotangent);
  spoilt = any_lane<kLanes>(spoilt);
  delta = sum_lanes<kLanes>(delta);
  square = sum_lanes<kLanes>(square);
  const bool silent = spoilt || !has_cotangent;
  const float log2_lse = lse * kLog2e;
  RowStats stats;
  stats.lse = silent || lse == -INFINITY || lse == kSelfOnlyLse ? INFINITY
              : row_stats != nullptr                            ? log2_lse
                                                                : bounding_lse(log2_lse);
  stats.delta = silent ? 0 : delta - grad_lse;
  stats.key_scale = !shared_qk ? 1 : spoilt ? kMaxKeyScale : key_scale_of(square);
  stats.is_padding = spoilt ? kSpoiltPadding : is_padding ? 1 : 0;
  if (!position.real || position.lane != 0) return;
  if (row_stats != nullptr) {
    row_stats[position.index] = stats;
  } else {
    constexpr auto kElementBytes = static_cast<int64_t>(sizeof(T));
    const auto* grad_v = reinterpret_cast<uint8_t*>(position.template head_rows<T>(params.grad_v));
    const RowStats* place = row_stats_in(grad_v, params.grad_v.stride_l * kElementBytes,
                                         head_dim * kElementBytes / sizeof(RowStats), position.l);
    *const_cast<RowStats*>(place) = stats;
  }
}

// Adds to each sum its row of every round, in their order. In batches of eight rows, each loaded
// before any of it is used.
template <typename T, int kSums>
__device__ __forceinline__ void add_rounds(Piece<T> (&sums)[kSums], const T* const (&rows)[kSums],
                                           int64_t stride, int rounds) {
  constexpr int kBatch = 8 / kSums;
  for (int begin = 0; begin < rounds; begin += kBatch) {
    Words words[kBatch][kSums];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t round = begin + i;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        words[i][s] = round < rounds ? load_streamed(rows[s] + round * stride) : Words{};
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s].add(Piece<T>(words[i][s]));
    }
  }
}
template <typename T>
__device__ __forceinline__ Piece<T> sum_rounds(const T* row, int64_t stride, int rounds) {
  Piece<T> sums[1];
  add_rounds<T, 1>(sums, {row}, stride, rounds);
  return sums[0];
}

// Sums the rounds' gradients. For shared QK the gradient of k = q / |q| goes through the
// normalisation, dq += (dk - (dk . k) k) / |q|, unless the main kernel has done that: kProject. A
// query that had nothing but itself passes its gradient on to its value.
template <typename T, int kLanes, bool kProject>
__global__ void __launch_bounds__(kThreads, kProject ? 3 : 4)
    reduce_kernel(const __grid_constant__ ChunkedAttentionBackwardParams params,
                  const __grid_constant__ BackwardStage stage) {
  constexpr int kStep = kLanes * Piece<T>::kSize;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Position<kLanes> position(params, stage.head_begin);
  const int rounds = static_cast<int>(params.rounds), head_dim = static_cast<int>(params.head_dim);
  const int64_t stride = params.length * head_dim;
  const int first = position.lane * Piece<T>::kSize;
  const T* partial_q = position.template partial<T>(stage.partial_q, params);
  const T* partial_k = position.template partial<T>(stage.partial_k, params);
  const T* partial_v = position.template partial<T>(stage.partial_v, params);
  T* grad_q = position.template row<T>(params.grad_q);
  const bool self_only =
      !params.own_values_apart &&
      params.lse[stage.head_begin * params.length + position.index] == kSelfOnlyLse;
  const auto store_grad_v = [&](Piece<T> sum, int d) {
    if (self_only) sum.add(Piece<T>(position.template row<T>(params.grad_out) + d));
    sum.store(position.template row<T>(params.grad_v) + d);
  };

  if constexpr (kProject) {
    constexpr int kPieces = kLanes == kFewLanes ? 1 : 256 / kStep;
    const T* q = position.template row<T>(params.q);
    Piece<T> grad_k[kPieces];
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int d = first + i * kStep;
      if (d >= head_dim) continue;
      grad_k[i] = sum_rounds(partial_k + d, stride, rounds);
      dot += grad_k[i].dot(Piece<T>(q + d));
    }
    dot = sum_lanes<kLanes>(dot);
    const float scale = stage.row_stats[position.index].key_scale;
    const float along = dot * scale * scale;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int d = first + i * kStep;
      if (d >= head_dim || !position.real) continue;
      // Below eps the length is fixed.
      if (scale < kMaxKeyScale) grad_k[i].add(Piece<T>(q + d), -along);
      Piece<T> sum = sum_rounds(partial_q + d, stride, rounds);
      sum.add(grad_k[i], scale);
      sum.store(grad_q + d);
      store_grad_v(sum_rounds(partial_v + d, stride, rounds), d);
    }
  } else {
    if (!position.real) return;
    for (int d = first; d < head_dim; d += kStep) {
      Piece<T> sums[2];
      add_rounds<T, 2>(sums, {partial_q + d, partial_v + d}, stride, rounds);
      sums[0].store(grad_q + d);
      store_grad_v(sums[1], d);
      if (params.k.data == nullptr) continue;
      sum_rounds(partial_k + d, stride, rounds).store(position.template row<T>(params.grad_k) + d);
    }
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// Launches, with a position of head_count heads to so many lanes, the kernel that
// choose(element, lanes) gives for the element type and integral_constant<int, lanes>.
template <class Choose, class... Args>
cudaError_t launch_positions(const ChunkedAttentionParams& params, int64_t head_count,
                             cudaStream_t stream, const Choose& choose, const Args&... args) {
  const auto launch = [&](auto element, auto lanes) {
    const dim3 grid(blocks_for(params.length * lanes), static_cast<unsigned>(head_count));
    return launch_overlapped(choose(element, lanes), {grid, kThreads}, stream, args...);
  };
  const auto by_lanes = [&](auto element) {
    constexpr int kPieceBytes = 16;
    return params.head_dim * element_size(params.dtype) <= kFewLanes * kPieceBytes
               ? launch(element, std::integral_constant<int, kFewLanes>{})
               : launch(element, std::integral_constant<int, kManyLanes>{});
  };
  return dispatch_dtype(params.dtype, by_lanes);
}

// The instances of the main kernels, but for local attention's.
struct MainKernels {
  decltype(&generic_forward) forward;
  decltype(&generic_backward) backward;
};

MainKernels main_kernels(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::wgmma:
      return {wgmma_forward, wgmma_backward};
    case AttentionKernel::mma_sync:
      return {mma_sync_forward, mma_sync_backward};
    default:
      return {generic_forward, generic_backward};
  }
}

template <typename Params>
cudaError_t plan_here(const Params& params, AttentionPlan* plan) {
  DeviceTraits traits{};
  bool has_wgmma = false;
  const cudaError_t error = attention_device(&traits, &has_wgmma);
  if (error == cudaSuccess) *plan = plan_chunked_attention(params, traits, has_wgmma);
  return error;
}

cudaError_t number_chunks(const ChunkedAttentionParams& params, int64_t head_begin,
                          int64_t head_count, int32_t* chunk_numbers, cudaStream_t stream) {
  const dim3 grid(blocks_for(params.length), static_cast<unsigned>(head_count));
  return launch_overlapped(chunk_numbers_kernel, {grid, kThreads}, stream, params, head_begin,
                           chunk_numbers);
}

cudaError_t forward_heads(const ChunkedAttentionParams& params, AttentionKernel kernel,
                          int64_t head_begin, int64_t head_count, cudaStream_t stream) {
  ForwardWorkspace workspace(params, head_count, kernel, params.workspace);
  ForwardStage& stage = workspace.stage;
  stage.head_begin = head_begin;
  stage.head_count = head_count;

  cudaError_t error = cudaSuccess;
  if (workspace.chunk_numbers != nullptr) {
    error = number_chunks(params, head_begin, head_count, workspace.chunk_numbers, stream);
    if (error != cudaSuccess) return error;
  }
  if (workspace.pair_bits != nullptr) {
    error = make_pair_bits(params, head_begin, head_count, workspace.chunk_numbers, false,
                           workspace.pair_bits, stream);
    if (error != cudaSuccess) return error;
  }
  if (workspace.key_scale != nullptr) {
    const auto kernel = [](auto element, auto lanes) {
      return key_scale_kernel<decltype(element), lanes()>;
    };
    error = launch_positions(params, head_count, stream, kernel, params, head_begin,
                             workspace.key_scale);
    if (error != cudaSuccess) return error;
  }
  error = main_kernels(kernel).forward(params, stage, stream);
  if (error != cudaSuccess) return error;
  const auto combine = [&](auto element, auto lanes) {
    using T = decltype(element);
    return params.rounds <= kFewRounds ? combine_kernel<T, lanes(), kFewRounds>
                                       : combine_kernel<T, lanes(), kManyRounds>;
  };
  return launch_positions(params, head_count, stream, combine, params, stage);
}

cudaError_t backward_heads(const ChunkedAttentionBackwardParams& params, AttentionKernel kernel,
                           int64_t head_begin, int64_t head_count, cudaStream_t stream) {
  BackwardWorkspace workspace(params, head_count, kernel, params.workspace);
  BackwardStage& stage = workspace.stage;
  stage.head_begin = head_begin;
  stage.head_count = head_count;

  cudaError_t error = cudaSuccess;
  if (workspace.chunk_numbers != nullptr) {
    error = number_chunks(params, head_begin, head_count, workspace.chunk_numbers, stream);
    if (error != cudaSuccess) return error;
  }
  if (workspace.pair_bits != nullptr) {
    error = make_pair_bits(params, head_begin, head_count, workspace.chunk_numbers, true,
                           workspace.pair_bits, stream);
    if (error != cudaSuccess) return error;
  }
  const auto row_stats = [](auto element, auto lanes) {
    return row_stats_kernel<decltype(element), lanes()>;
  };
  error =
      launch_positions(params, head_count, stream, row_stats, params, head_begin, stage.row_stats);
  if (error != cudaSuccess) return error;
  error = main_kernels(kernel).backward(params, stage, stream);
  if (error != cudaSuccess) return error;
  const bool project = is_shared_qk(params) && stage.partial_k != nullptr;
  const auto reduce = [&](auto element, auto lanes) {
    using T = decltype(element);
    return project ? reduce_kernel<T, lanes(), true> : reduce_kernel<T, lanes(), false>;
  };
  return launch_positions(params, head_count, stream, reduce, params, stage);
}

}  // namespace

int64_t chunked_attention_forward_workspace(const ChunkedAttentionParams& params) {
  AttentionPlan plan{};
  return plan_here(params, &plan) == cudaSuccess ? plan.workspace : 0;
}

int64_t chunked_attention_backward_workspace(const ChunkedAttentionBackwardParams& params) {
  AttentionPlan plan{};
  return plan_here(params, &plan) == cudaSuccess ? plan.workspace : 0;
}

cudaError_t chunked_attention_forward(const ChunkedAttentionParams& params, cudaStream_t stream) {
  if (!attention_is_valid(params)) return cudaErrorInvalidValue;
  AttentionPlan plan{};
  cudaError_t error = plan_here(params, &plan);
  if (error != cudaSuccess) return error;
  if (plan.kernel == AttentionKernel::local) return local_forward(params, stream);
  const int64_t heads = params.batch * params.heads, group = plan.head_group;
  for (int64_t head = 0; head < heads && error == cudaSuccess; head += group) {
    error = forward_heads(params, plan.kernel, head, std::min(group, heads - head), stream);
  }
  return error;
}

cudaError_t chunked_attention_backward(const ChunkedAttentionBackwardParams& params,
                                       cudaStream_t stream) {
  if (!attention_is_valid(params)) return cudaErrorInvalidValue;
  AttentionPlan plan{};
  cudaError_t error = plan_here(params, &plan);
  if (error != cudaSuccess) return error;
  if (plan.kernel == AttentionKernel::local) return local_backward(params, stream);
  const int64_t heads = params.batch * params.heads, group = plan.head_group;
  for (int64_t head = 0; head < heads && error == cudaSuccess; head += group) {
    error = backward_heads(params, plan.kernel, head, std::min(group, heads - head), stream);
  }
  return error;
}

}  // namespace reformer::kernels

// The hash for any sizes, types and device: a tiled fp32 product in registers whose columns are
// reduced to their argmax as they come, so that xR is never stored. mma_sync.cu and wgmma.cu have
// the tensor-core instances, direct.cu the one for few tokens.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/device_traits.cuh"
#include "common/dtype.cuh"
#include "lsh_hash.h"
#include "lsh_hash/columns.h"
#include "lsh_hash/instances.h"
#include "lsh_hash/plan.h"

namespace reformer::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 128, kDepth = 32;  // a block's tokens, and the slab of D it holds
constexpr int kTileColumns = 4;            // of one factor
constexpr int kColumnThreads = 16;
constexpr int kThreadTokens = 8;
static_assert(kThreads == kTokens / kThreadTokens * kColumnThreads, "one thread per register tile");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Strictly larger, so that the lowest of equal columns stays, and a NaN is never taken.
__device__ __forceinline__ void take_larger(LargestColumn& best, float value, int column) {
  if (fabsf(value) > fabsf(best.value)) best = {value, column};
}

// A thread takes kParts tiles of columns, a block kColumnThreads times as many.
template <int kParts>
struct Shared {
  static constexpr int kTiles = kParts * kColumnThreads, kColumns = kTiles * kTileColumns;
  struct Slab {
    float x[kDepth][kTokens];
    float rotations[kDepth][kColumns];
  };
  union {
    Slab slab;
    LargestColumn candidates[kTiles][kTokens];
  };
  int64_t source[kColumns];  // offset of each column in a row of the rotations; -1: padding

  // Neighbouring tiles of a token, and neighbouring tokens of a tile, lie in different banks.
  __device__ __forceinline__ LargestColumn& candidate(int tile, int token) {
    return candidates[tile][token ^ (tile % kColumnThreads)];
  }
};

// Slot of a token's element in Slab::x: spreads eight depths over the banks and keeps fours
// together.
__device__ __forceinline__ int x_slot(int depth, int token) { return token ^ (depth % 8 * 4); }

template <typename X, int kParts>
__device__ __forceinline__ void load_x(Shared<kParts>& shared, const X* rows, int64_t stride,
                                       int count, int begin, int head_dim) {
  constexpr int kLaneTokens = 4, kLaneDepths = 8;  // of a warp's load
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int depth_lane = lane % kLaneDepths, token_lane = lane / kLaneDepths;
#pragma unroll
  for (int i = 0; i < kTokens / kLaneTokens / (kThreads / 32); ++i) {
    const int token = (i * (kThreads / 32) + warp) * kLaneTokens + token_lane;
#pragma unroll
    for (int step = 0; step < kDepth; step += kLaneDepths) {
      const int depth = step + depth_lane;
      const bool inside = token < count && begin + depth < head_dim;
      shared.slab.x[depth][x_slot(depth, token)] =
          inside ? to_float(rows[token * stride + begin + depth]) : 0.0f;
    }
  }
}

template <typename T, int kParts>
__device__ __forceinline__ void load_rotations_of(Shared<kParts>& shared,
                                                  const LshHashParams& params, int64_t row_stride,
                                                  int64_t head, int begin) {
  constexpr int kColumns = Shared<kParts>::kColumns, kRows = kThreads / kColumns;
  const int column = threadIdx.x % kColumns, first = threadIdx.x / kColumns;
  const int64_t source = shared.source[column];
  const T* rotation = static_cast<const T*>(params.rotations) +
                      (head * params.head_dim + begin + first) * row_stride + source;
#pragma unroll
  for (int depth = first; depth < kDepth; depth += kRows, rotation += kRows * row_stride) {
    const bool inside = source >= 0 && begin + depth < params.head_dim;
    shared.slab.rotations[depth][column] = inside ? to_float(*rotation) : 0.0f;
  }
}

template <int kParts>
__device__ __forceinline__ void load_rotations(Shared<kParts>& shared, const LshHashParams& params,
                                               int64_t row_stride, int64_t head, int begin) {
  switch (params.rotations_dtype) {
    case DType::f32:
      return load_rotations_of<float>(shared, params, row_stride, head, begin);
    case DType::f16:
      return load_rotations_of<__half>(shared, params, row_stride, head, begin);
    case DType::bf16:
      return load_rotations_of<__nv_bfloat16>(shared, params, row_stride, head, begin);
  }
}

// One token's way through the tiles of columns, in order.
struct TokenState {
  HashColumns::Factor now;
  LargestColumn best = {0.0f, 0};
  int round = 0, factor = 0, tile = 0, bucket = 0;

  __device__ __forceinline__ explicit TokenState(const HashColumns& columns)
      : now(columns.factors[0]) {}

  // Takes a tile's candidate; true when that completes a round, whose bucket is then in `bucket`.
  __device__ __forceinline__ bool advance(LargestColumn candidate, const HashColumns& columns) {
    take_larger(best, candidate.value, tile * kTileColumns + candidate.column);
    if (++tile < now.tiles) return false;
    bucket += now.place * (best.column + (best.value < 0.0f ? now.columns : 0));
    best = {0.0f, 0};
    tile = 0;
    const bool last = ++factor == columns.n_factors;
    if (last) factor = 0;
    now = columns.factors[factor];
    return last;
  }
};

// A block hashes kTokens tokens of one sequence into the rounds from blockIdx.y * round_group on.
template <typename X, int kParts>
__global__ __launch_bounds__(kThreads,
                             2) void hash_kernel(const __grid_constant__ LshHashParams params,
                                                 const __grid_constant__ HashColumns columns,
                                                 int token_tiles, int round_group) {
  constexpr int kTiles = Shared<kParts>::kTiles, kColumns = Shared<kParts>::kColumns;
  __shared__ Shared<kParts> shared;
  const int64_t sequence = blockIdx.x / token_tiles;
  const int64_t batch = sequence / params.heads, head = sequence % params.heads;
  const int64_t first_token = int64_t{blockIdx.x % token_tiles} * kTokens;
  const int count = static_cast<int>(min(int64_t{kTokens}, params.length - first_token));
  const int64_t rotation_head = params.rotation_heads == 1 ? 0 : head;
  const int64_t row_stride = params.rounds * columns.columns;
  const X* rows = static_cast<const X*>(params.x) + batch * params.x_stride_b +
                  head * params.x_stride_h + first_token * params.x_stride_l;
  const int first_round = blockIdx.y * round_group;
  const int rounds = min(round_group, static_cast<int>(params.rounds) - first_round);
  const int tiles = rounds * columns.tiles_per_round;

  const int column_thread = threadIdx.x % kColumnThreads;
  const int my_token = threadIdx.x / kColumnThreads * kThreadTokens;

  TokenState state(columns);  // of token threadIdx.x
  const bool owns_token = threadIdx.x < count;
  const bool is_padding =
      owns_token && params.key_padding_mask != nullptr &&
      params.key_padding_mask[batch * params.length + first_token + threadIdx.x];

  for (int base = 0; base < tiles; base += kTiles) {
    if (threadIdx.x < kColumns) {
      const int tile = base + threadIdx.x / kTileColumns;
      int round_tile = tile % columns.tiles_per_round, factor = 0;
      while (round_tile >= columns.factors[factor].tiles)
        round_tile -= columns.factors[factor++].tiles;
      const int column = round_tile * kTileColumns + threadIdx.x % kTileColumns;
      const bool real = tile < tiles && column < columns.factors[factor].columns;
      shared.source[threadIdx.x] =
          real ? int64_t{first_round + tile / columns.tiles_per_round} * columns.columns +
                     columns.factors[factor].first_column + column
               : -1;
    }
    float sums[kParts][kThreadTokens][kTileColumns] = {};
    for (int begin = 0; begin < params.head_dim; begin += kDepth) {
      __syncthreads();  // sources written; previous slab or candidates read
      load_x(shared, rows, params.x_stride_l, count, begin, static_cast<int>(params.head_dim));
      load_rotations(shared, params, row_stride, rotation_head, begin);
      __syncthreads();
#pragma unroll 8
      for (int depth = 0; depth < kDepth; ++depth) {
        float x[kThreadTokens];
#pragma unroll
        for (int i = 0; i < kThreadTokens; i += 4) {
          *reinterpret_cast<float4*>(x + i) =
              *reinterpret_cast<const float4*>(shared.slab.x[depth] + x_slot(depth, my_token + i));
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int column = (part * kColumnThreads + column_thread) * kTileColumns;
          const float4 g = *reinterpret_cast<const float4*>(shared.slab.rotations[depth] + column);
#pragma unroll
          for (int i = 0; i < kThreadTokens; ++i) {
            sums[part][i][0] = fmaf(x[i], g.x, sums[part][i][0]);
            sums[part][i][1] = fmaf(x[i], g.y, sums[part][i][1]);
            sums[part][i][2] = fmaf(x[i], g.z, sums[part][i][2]);
            sums[part][i][3] = fmaf(x[i], g.w, sums[part][i][3]);
          }
        }
      }
    }
    __syncthreads();  // the last slab has been read: its place is the candidates'
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        LargestColumn best = {0.0f, 0};
#pragma unroll
        for (int c = 0; c < kTileColumns; ++c) take_larger(best, sums[part][i][c], c);
        shared.candidate(part * kColumnThreads + column_thread, my_token + i) = best;
      }
    }
    __syncthreads();
    if (owns_token) {
      constexpr int kAtOnce = 8;
      for (int i = 0; i < min(kTiles, tiles - base); i += kAtOnce) {
        LargestColumn candidates[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          candidates[j] = shared.candidate(i + j, static_cast<int>(threadIdx.x));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (base + i + j >= tiles || !state.advance(candidates[j], columns)) continue;
          const int64_t round = (sequence * params.rounds) + first_round + state.round;
          params.buckets[round * params.length + first_token + threadIdx.x] =
              is_padding ? columns.padding_bucket : state.bucket;
          state.bucket = 0;
          ++state.round;
        }
      }
    }
  }
}

template <typename X>
cudaError_t launch(const LshHashParams& params, cudaStream_t stream) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const HashColumns columns(params, kTileColumns);
  const int64_t token_tiles = ceil_div<int64_t>(params.length, kTokens);
  const int64_t blocks = params.batch * params.heads * token_tiles;
  if (blocks > INT32_MAX || columns.tiles_per_round * params.rounds > INT32_MAX)
    return cudaErrorInvalidValue;
  // Few tokens: share the rounds among more blocks.
  constexpr int kMaxGridY = 65535;
  const int64_t wanted =
      std::min(params.rounds, ceil_div<int64_t>(4 * traits.multiprocessors, blocks));
  const int round_group =
      static_cast<int>(ceil_div(params.rounds, std::min<int64_t>(wanted, kMaxGridY)));
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div<int64_t>(params.rounds, round_group)));
  const auto kernel = round_group * columns.tiles_per_round <= kColumnThreads ? hash_kernel<X, 1>
                                                                              : hash_kernel<X, 2>;
  kernel<<<grid, kThreads, 0, stream>>>(params, columns, static_cast<int>(token_tiles),
                                        round_group);
  return cudaGetLastError();
}

cudaError_t plan_lsh_hash_here(const LshHashParams& params, HashPlan* plan) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error == cudaSuccess) *plan = plan_lsh_hash(params, traits, lsh_hash_has_wgmma());
  return error;
}

}  // namespace

int64_t lsh_hash_workspace(const LshHashParams& params) {
  HashPlan plan{};
  return plan_lsh_hash_here(params, &plan) == cudaSuccess ? plan.workspace : 0;
}

cudaError_t lsh_hash(const LshHashParams& params, cudaStream_t stream) {
  if (!hash_is_valid(params)) return cudaErrorInvalidValue;
  if (params.batch * params.heads * params.length * params.rounds == 0) return cudaSuccess;
  HashPlan plan{};
  const cudaError_t error = plan_lsh_hash_here(params, &plan);
  if (error != cudaSuccess) return error;
  switch (plan.kernel) {
    case HashKernel::direct:
      return lsh_hash_direct(params, stream);
    case HashKernel::wgmma:
      return lsh_hash_wgmma(params, stream);
    case HashKernel::mma_sync:
      return lsh_hash_mma_sync(params, stream);
    case HashKernel::simt:
      return lsh_hash_simt(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t lsh_hash_simt(const LshHashParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.x_dtype,
                        [&](auto x) { return launch<decltype(x)>(params, stream); });
}

}  // namespace reformer::kernels

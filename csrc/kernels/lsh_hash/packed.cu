#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/launch.cuh"
#include "lsh_hash/packed.h"

namespace reformer::kernels::packed_hash {
namespace {

// The element of D that stands at index k of a packed row.
__host__ __device__ constexpr int element_at(int k) {
  const int multiply = k / 16 % 2, lane = k % 8 / 2, upper = k % 16 / 8;
  return k / 32 * 32 + lane * 8 + multiply * 4 + upper * 2 + k % 2;
}

template <typename T>
__global__ void pack_kernel(const __grid_constant__ LshHashParams params,
                            const __grid_constant__ HashColumns columns, Packing packing) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int kPiece = 8, kPieces = 8;  // elements of a piece, pieces of a row
  const int64_t pieces =
      params.rotation_heads * packing.groups * packing.halves * kPieces * packing.columns;
  const int64_t piece = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int column = piece % packing.columns;
  int64_t rest = piece / packing.columns;
  const int piece_of_row = rest % kPieces;
  rest /= kPieces;
  const int half = rest % packing.halves;
  rest /= packing.halves;
  const int group = rest % packing.groups;
  const int64_t head = rest / packing.groups;

  int tile = column / kTileColumns;
  const int lane = column % kTileColumns / kLaneColumns;
  const int round = group * packing.rounds + tile / columns.tiles_per_round * kLaneRounds + lane;
  const bool inside = round < min(static_cast<int>(params.rounds), (group + 1) * packing.rounds);
  tile %= columns.tiles_per_round;
  int factor = 0;
  while (tile >= columns.factors[factor].tiles) tile -= columns.factors[factor++].tiles;
  const int factor_column = tile * kLaneColumns + column % kLaneColumns;
  const bool real = inside && factor_column < columns.factors[factor].columns;

  const T* rotations = static_cast<const T*>(params.rotations);
  const int64_t row_stride = params.rounds * columns.columns;
  const int64_t source =
      round * columns.columns + columns.factors[factor].first_column + factor_column;
  alignas(16) T packed[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const int element = half * 64 + element_at(piece_of_row * kPiece + i);
    packed[i] = real && element < params.head_dim
                    ? rotations[(head * params.head_dim + element) * row_stride + source]
                    : T(0.0f);
  }
  char* row = static_cast<char*>(params.workspace) +
              (head * packing.groups + group) * packing.group_bytes() +
              (int64_t{half} * packing.columns + column) * kRowBytes;
  reinterpret_cast<uint4*>(row)[piece_of_row ^ (column % 8)] =
      *reinterpret_cast<const uint4*>(packed);
}

}  // namespace

bool suits(const LshHashParams& params) {
  constexpr int64_t kMaxHeadDim = 256;
  constexpr int64_t kMinTokens = 16;   // of a tile
  constexpr int64_t kMaxTokens = 512;  // of a block's tiles and those it loads ahead
  const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
  if (params.x_dtype == DType::f32 || params.x_dtype != params.rotations_dtype ||
      params.head_dim > kMaxHeadDim || params.head_dim % 8 != 0 ||
      reinterpret_cast<uintptr_t>(params.x) % 16 != 0 || !aligned(params.x_stride_b) ||
      !aligned(params.x_stride_h) || !aligned(params.x_stride_l)) {
    return false;
  }
  const int64_t tiles = params.batch * params.heads * ceil_div<int64_t>(params.length, kMinTokens);
  return tiles <= INT32_MAX && params.length <= INT32_MAX - kMaxTokens;
}

Packing make_packing(const LshHashParams& params, const HashColumns& columns, int chunk_tiles,
                     int64_t shared_memory, int64_t min_groups) {
  const int chunk_columns = kTileColumns * chunk_tiles;
  Packing packing{};
  packing.halves = params.head_dim <= 64 ? 1 : params.head_dim <= 128 ? 2 : 4;
  const int64_t fitting_columns =
      shared_memory / (packing.halves * kRowBytes) / chunk_columns * chunk_columns;
  const int64_t lap_columns = int64_t{columns.tiles_per_round} * kTileColumns;
  const int64_t laps = ceil_div<int64_t>(params.rounds, kLaneRounds);  // kLaneRounds rounds each
  const int64_t fitting_laps = std::min(fitting_columns / lap_columns, laps);
  if (fitting_laps == 0) return packing;
  const int64_t groups = std::max(ceil_div(laps, fitting_laps), std::min(min_groups, laps));
  const int64_t group_laps = ceil_div(laps, groups);
  packing.rounds = static_cast<int>(group_laps * kLaneRounds);
  packing.groups = static_cast<int>(ceil_div(laps, group_laps));
  packing.columns = static_cast<int>(round_up<int64_t>(group_laps * lap_columns, chunk_columns));
  return packing;
}

cudaError_t pack_rotations(const LshHashParams& params, const HashColumns& columns,
                           const Packing& packing, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t pieces = packed_bytes(params, packing) / 16;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(pieces, kThreads));
  const auto kernel =
      params.x_dtype == DType::f16 ? pack_kernel<__half> : pack_kernel<__nv_bfloat16>;
  return launch_overlapped(kernel, {blocks, kThreads}, stream, params, columns, packing);
}

}  // namespace reformer::kernels::packed_hash

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

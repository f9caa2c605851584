// The hash on tensor cores by mma.sync, from sm_80 on: persistent blocks of independent warps.
//
// The rotations of one head stay in shared memory; blocks take contiguous runs of token tiles, head
// after head, so they reload them once or twice. A warp holds its tokens as A operands in
// registers, loaded straight from global memory: many, since each column read from shared memory
// serves all of them. It searches the products with one tile of columns while the tensor cores
// compute those with the next.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "lsh_hash/instances.h"
#include "lsh_hash/packed.h"
#include "lsh_hash/plan.h"
#include "lsh_hash/search.cuh"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace hash_mma_sync {
namespace {

using namespace packed_hash;

constexpr int kTileBytes = kTileColumns * kRowBytes;
constexpr int kBlockWarps = 4;  // at least
constexpr int kChunk = hash_tuning::kMmaSyncChunk;

// Row tiles of a warp, and the warps of a multiprocessor that their registers allow; kSteps: D /
// 16, rounded up to 2, 4, 8 or 16.
template <int kSteps>
struct Shape {
  static constexpr int kRowTiles = hash_tuning::mma_sync_row_tiles(kSteps);
  static constexpr int kWarps = hash_tuning::mma_sync_warps(kSteps);
};

__device__ __forceinline__ void load_rotations(char* shared, const char* packed, int64_t bytes) {
  __syncthreads();  // the previous rotations are no longer read
  for (int64_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
    copy_async<16>(shared_address(shared + i), packed + i);
  }
  wait_for_copies();
  __syncthreads();
}

// Where a lane reads the first tile's 32 even or odd elements of 64, as load_matrices wants it.
__device__ __forceinline__ uint32_t lane_row(const char* rotations, int odd) {
  const uint32_t column = threadIdx.x % 8, piece = threadIdx.x % 32 / 8 + odd * 4;
  return shared_address(rotations) + column * kRowBytes + (piece ^ column) * 16;
}

// products = tokens * tile^T
template <typename T, int kRowTiles, int kSteps>
__device__ __forceinline__ void multiply(float (&products)[kRowTiles][4],
                                         const uint32_t (&tokens)[kRowTiles][kSteps][4],
                                         const uint32_t (&lane_rows)[2], uint32_t tile,
                                         uint32_t half_stride) {
#pragma unroll
  for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[row][i] = 0.0f;
  }
#pragma unroll
  for (int part = 0; part < kSteps / 2; ++part) {
    uint32_t b[4];
    load_matrices(b, lane_rows[part % 2] + (tile + part / 2 * half_stride));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
        mma_m16n8k16(products[row], tokens[row][2 * part + step], b[2 * step], b[2 * step + 1],
                     T{});
      }
    }
  }
}

// A warp's token tiles are numbered by head, then by batch.
template <typename T, int kSteps, int kRowTiles, int kWarps, int kUnit>
__global__ __launch_bounds__(kWarps * 32,
                             1) void hash_kernel(const __grid_constant__ LshHashParams params,
                                                 const __grid_constant__ HashColumns columns,
                                                 const __grid_constant__ Packing packing,
                                                 int tiles_per_sequence, OpaqueZero zero) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(kRowBytes) char shared[];
  const uint32_t lane_rows[2] = {lane_row(shared, 0), lane_row(shared, 1)};
  const uint32_t half_stride = packing.columns * kRowBytes;
  const int chunks = packing.columns / (kChunk * kTileColumns);
  const int group = blockIdx.y, first_round = group * packing.rounds;
  const int rounds = min(packing.rounds, static_cast<int>(params.rounds) - first_round);

  const int tiles_per_head = static_cast<int>(params.batch) * tiles_per_sequence;
  const int64_t tiles = params.heads * tiles_per_head;
  const int first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  // The shuffle tells the compiler that it is the same in all lanes, and with it the loops below.
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
  const int warps = static_cast<int>(blockDim.x) / 32;

  int64_t loaded = -1;
  for (int begin = first, end; begin < last; begin = end) {
    const int head = begin / tiles_per_head, head_tile = head * tiles_per_head;
    end = min(last, head_tile + tiles_per_head);
    const int64_t rotation_head = params.rotation_heads == 1 ? 0 : head;
    if (rotation_head != loaded) {
      loaded = rotation_head;
      load_rotations(shared,
                     static_cast<const char*>(params.workspace) +
                         (rotation_head * packing.groups + group) * packing.group_bytes(),
                     packing.group_bytes());
    }

    for (int tile = begin + warp; tile < end; tile += warps) {
      const int64_t batch = (tile - head_tile) / tiles_per_sequence;
      const int first_token = (tile - head_tile) % tiles_per_sequence * (16 * kRowTiles);
      Operands<kRowTiles, kSteps> operands;
      {
        Tokens<kRowTiles, kSteps> tokens;
        load_tokens<kRowTiles, kSteps>(tokens, Sequence(params, batch, head), first_token);
        to_operands<kRowTiles, kSteps>(operands, tokens);
      }
      // As results of an operation: else they stay in the registers of the loads, from where ptxas
      // moves them to an operand's four before each multiply.
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) operands[row][step][i] |= __float_as_uint(zero.value);
        }
      }
      Search<kRowTiles, kUnit, kChunk> search(params, columns, batch, head, first_round, rounds,
                                              zero);
      search.start(first_token);

      float products[2][kRowTiles][4];
      uint32_t offset = 0;
      multiply<T, kRowTiles, kSteps>(products[0], operands, lane_rows, offset, half_stride);
      for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i + 1 < kChunk || chunk + 1 < chunks) {
            multiply<T, kRowTiles, kSteps>(products[(i + 1) % 2], operands, lane_rows,
                                           offset + (i + 1) * kTileBytes, half_stride);
          }
          search.take(i, products[i % 2]);
        }
        offset += kChunk * kTileBytes;
      }
    }
  }
}

// ---- Host

// Calls f with D / 16, rounded up to what the kernels know.
template <class Function>
auto with_steps(const LshHashParams& params, const Function& f) {
  if (params.head_dim <= 32) return f(std::integral_constant<int, 2>{});
  if (params.head_dim <= 64) return f(std::integral_constant<int, 4>{});
  if (params.head_dim <= 128) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, 16>{});
}

int64_t tiles_of_sequence(const LshHashParams& params, int row_tiles) {
  return ceil_div<int64_t>(params.length, 16 * row_tiles);
}

// Blocks are as small as copies of the rotations fit into a multiprocessor's shared memory: that
// makes them independent, and evens out their load.
int blocks_per_multiprocessor(const DeviceTraits& traits, int64_t bytes, int warps) {
  constexpr int64_t kReserved = 1024;  // of every block; the multiprocessor has as much more
  const int64_t fitting = (traits.shared_memory + kReserved) / (bytes + kReserved);
  return static_cast<int>(std::clamp<int64_t>(fitting, 1, warps / kBlockWarps));
}

template <typename T, int kSteps, int kRowTiles, int kWarps, int kUnit>
cudaError_t launch(const LshHashParams& params, const HashColumns& columns, const Packing& packing,
                   const DeviceTraits& traits, cudaStream_t stream) {
  const auto kernel = hash_kernel<T, kSteps, kRowTiles, kWarps, kUnit>;
  const int bytes = static_cast<int>(packing.group_bytes());
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  error = pack_rotations(params, columns, packing, stream);
  if (error != cudaSuccess) return error;

  const int blocks = blocks_per_multiprocessor(traits, bytes, kWarps), warps = kWarps / blocks;
  const int64_t tiles_per_sequence = tiles_of_sequence(params, kRowTiles);
  const int64_t tiles = params.batch * params.heads * tiles_per_sequence;
  const int64_t resident = std::max(1, traits.multiprocessors * blocks / packing.groups);
  const dim3 grid(static_cast<unsigned>(std::min(resident, ceil_div<int64_t>(tiles, warps))),
                  static_cast<unsigned>(packing.groups));
  return launch_overlapped(kernel, {grid, warps * 32, bytes}, stream, params, columns, packing,
                           tiles_per_sequence, OpaqueZero{0.0f});
}

template <typename T>
cudaError_t choose(const LshHashParams& params, const HashColumns& columns, const Packing& packing,
                   const DeviceTraits& traits, cudaStream_t stream) {
  return with_steps(params, [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    const auto launch_unit = [&](auto unit) {
      return launch<T, kSteps, Shape<kSteps>::kRowTiles, Shape<kSteps>::kWarps,
                    decltype(unit)::value>(params, columns, packing, traits, stream);
    };
    if constexpr (kSteps > 8) return launch_unit(std::integral_constant<int, 1>{});
    return with_unit(columns, launch_unit);
  });
}

}  // namespace
}  // namespace hash_mma_sync

bool lsh_hash_mma_sync_supports(const LshHashParams& params) {
  DeviceTraits traits{};
  return current_device_traits(&traits) == cudaSuccess && hash_mma_sync_supports(params, traits);
}

int64_t lsh_hash_mma_sync_workspace(const LshHashParams& params) {
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess) return 0;
  return packed_hash::packed_bytes(params, mma_sync_packing(params, traits));
}

cudaError_t lsh_hash_mma_sync(const LshHashParams& params, cudaStream_t stream) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const HashColumns columns = packed_hash::lane_columns(params);
  const auto packing = mma_sync_packing(params, traits);
  if (params.x_dtype == DType::f16) {
    return hash_mma_sync::choose<__half>(params, columns, packing, traits, stream);
  }
  return hash_mma_sync::choose<__nv_bfloat16>(params, columns, packing, traits, stream);
}

}  // namespace reformer::kernels

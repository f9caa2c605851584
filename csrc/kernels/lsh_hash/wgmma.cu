// The hash on Hopper's tensor cores: persistent blocks of independent warpgroups.
//
// The rotations of one head stay in shared memory, packed once per call into wgmma's swizzled
// tiles; blocks take contiguous runs of token tiles, head after head, so they reload them once or
// twice. A warpgroup holds 64 tokens as A operands in registers, loaded straight from global
// memory, and the next 64 on their way. It multiplies them by one chunk of columns after the other
// and searches the products, in registers, for the largest absolute value of each factor.
//
// The search, not the multiply, sets the pace (ncu: issue slots 52% busy, tensor cores 37%): hence
// the care about its instructions. Warpgroups out of step hide the multiply: a second set of
// accumulators, or more warpgroups, gained nothing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "lsh_hash/instances.h"
#include "lsh_hash/packed.h"
#include "lsh_hash/plan.h"
#include "lsh_hash/search.cuh"
#include "tensor_core/wgmma.cuh"

namespace reformer::kernels {
namespace hash_wgmma {
namespace {

using namespace packed_hash;

constexpr int kTokens = 64;  // of a warpgroup's tile
constexpr int kChunk = hash_tuning::kWgmmaChunk;
constexpr int kAlignment = hash_tuning::kWgmmaAlignment;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define REFORMER_HASH_SM90A 1
#endif

// Warpgroups of a block, one block to a multiprocessor: as many as their registers allow.
__host__ __device__ constexpr int warpgroups(int steps) { return steps <= 4 ? 4 : 3; }

constexpr int launch_bound(int steps) {
#if defined(__CUDA_ARCH__) && !defined(REFORMER_HASH_SM90A)
  return 32;  // no body: see has_body
#else
  return warpgroups(steps) * 128;
#endif
}

#ifdef REFORMER_HASH_SM90A

using Products = tiled::AccumulatorOf<kChunk * kTileColumns>;  // of 64 tokens

// ---- Kernel

template <int kThreads>
__device__ __forceinline__ void load_rotations(char* shared, const char* packed, int64_t bytes) {
  const auto* source = reinterpret_cast<const uint4*>(packed);
  auto* destination = reinterpret_cast<uint4*>(shared);
  const int pieces = static_cast<int>(bytes / sizeof(uint4));
  __syncthreads();  // the previous rotations are no longer read
#pragma unroll 8
  for (int i = threadIdx.x; i < pieces; i += kThreads) destination[i] = __ldg(source + i);
  tiled::fence_shared_for_wgmma();
  __syncthreads();
}

// products = tokens * columns^T
template <typename T, int kSteps>
__device__ __forceinline__ void multiply(Products& products, const uint32_t (&tokens)[kSteps][4],
                                         uint32_t columns, uint32_t half_stride) {
  tiled::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    tiled::wgmma_k16<T, 0>(products, tokens[step],
                           columns + step / 4 * half_stride + step % 4 * tiled::kStepKMajor,
                           step > 0);
  }
  tiled::wgmma_commit();
  tiled::wgmma_wait<0>();
  tiled::pin(products);
}

#endif  // REFORMER_HASH_SM90A

// kSteps: D / 16, rounded up to 2, 4, 8 or 16. Token tiles are numbered by head, then by batch.
template <typename T, int kSteps, int kUnit>
__global__ __launch_bounds__(launch_bound(kSteps),
                             1) void hash_kernel(const __grid_constant__ LshHashParams params,
                                                 const __grid_constant__ HashColumns columns,
                                                 const __grid_constant__ Packing packing,
                                                 int tiles_per_sequence, OpaqueZero zero) {
#ifdef REFORMER_HASH_SM90A
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int kWarpgroups = warpgroups(kSteps);
  constexpr bool kPrefetch = kSteps <= 8;  // registers hold the next tokens too
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-shared_address(unaligned) & (kAlignment - 1));
  // Renewed, or it would be computed again for every chunk.
  const uint32_t rotations = tiled::renewed(tiled::tile_descriptor(shared_address(shared)));
  constexpr uint32_t kChunkStride = kChunk * kTileColumns * kRowBytes / 16;  // in descriptor units
  const uint32_t half_stride = packing.columns * (kRowBytes / 16);
  const int chunks = packing.columns / (kChunk * kTileColumns);
  const int group = blockIdx.y, first_round = group * packing.rounds;
  const int rounds = min(packing.rounds, static_cast<int>(params.rounds) - first_round);

  const int tiles_per_head = static_cast<int>(params.batch) * tiles_per_sequence;
  const int64_t tiles = params.heads * tiles_per_head;
  const int first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  // The shuffle tells the compiler that it is the same in all lanes, and with it the loops below.
  const int warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 128, 0);

  int64_t loaded = -1;
  for (int begin = first, end; begin < last; begin = end) {
    const int head = begin / tiles_per_head, head_tile = head * tiles_per_head;
    end = min(last, head_tile + tiles_per_head);
    const int64_t rotation_head = params.rotation_heads == 1 ? 0 : head;
    if (rotation_head != loaded) {
      loaded = rotation_head;
      load_rotations<kWarpgroups * 128>(
          shared,
          static_cast<const char*>(params.workspace) +
              (rotation_head * packing.groups + group) * packing.group_bytes(),
          packing.group_bytes());
    }
    for (int tile = begin + warpgroup; tile < end;) {
      const int batch = (tile - head_tile) / tiles_per_sequence;
      const int sequence_tile = head_tile + batch * tiles_per_sequence;
      const int sequence_end = min(end, sequence_tile + tiles_per_sequence);
      const Sequence sequence(params, batch, head);
      Search<1, kUnit, kChunk> search(params, columns, batch, head, first_round, rounds, zero);

      int token = (tile - sequence_tile) * kTokens + threadIdx.x % 128 / 32 * 16;
      Tokens<1, kSteps> tokens;
      load_tokens<1, kSteps>(tokens, sequence, token);
      for (; tile < sequence_end; tile += kWarpgroups, token += kWarpgroups * kTokens) {
        Operands<1, kSteps> operands;
        to_operands<1, kSteps>(operands, tokens);
        if constexpr (kPrefetch) {
          load_tokens<1, kSteps>(tokens, sequence, token + kWarpgroups * kTokens);
        }
        search.start(token);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          Products products;
          multiply<T, kSteps>(products, operands[0], rotations + chunk * kChunkStride, half_stride);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) search.take(i, &products[i]);
        }
        if constexpr (!kPrefetch) {
          load_tokens<1, kSteps>(tokens, sequence, token + kWarpgroups * kTokens);
        }
      }
    }
  }
#endif
}

// ---- Host

template <typename T, int kSteps, int kUnit>
cudaError_t launch(const LshHashParams& params, const HashColumns& columns, const Packing& packing,
                   const DeviceTraits& traits, cudaStream_t stream) {
  constexpr int kWarpgroups = warpgroups(kSteps);
  const auto kernel = hash_kernel<T, kSteps, kUnit>;
  const int bytes = static_cast<int>(packing.group_bytes()) + kAlignment;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;

  error = pack_rotations(params, columns, packing, stream);
  if (error != cudaSuccess) return error;

  const int tiles_per_sequence = static_cast<int>(ceil_div<int64_t>(params.length, kTokens));
  const int64_t tiles = params.batch * params.heads * tiles_per_sequence;
  const int64_t resident = std::max(1, traits.multiprocessors / packing.groups);
  const dim3 grid(static_cast<unsigned>(std::min(resident, ceil_div<int64_t>(tiles, kWarpgroups))),
                  static_cast<unsigned>(packing.groups));
  return launch_overlapped(kernel, {grid, kWarpgroups * 128, bytes}, stream, params, columns,
                           packing, tiles_per_sequence, OpaqueZero{0.0f});
}

template <typename T>
cudaError_t choose(const LshHashParams& params, const HashColumns& columns, const Packing& packing,
                   const DeviceTraits& traits, cudaStream_t stream) {
  if (params.head_dim > 128) return launch<T, 16, 1>(params, columns, packing, traits, stream);
  return with_unit(columns, [&](auto unit) {
    constexpr int kUnit = decltype(unit)::value;
    if (params.head_dim <= 32) return launch<T, 2, kUnit>(params, columns, packing, traits, stream);
    if (params.head_dim <= 64) return launch<T, 4, kUnit>(params, columns, packing, traits, stream);
    return launch<T, 8, kUnit>(params, columns, packing, traits, stream);
  });
}

}  // namespace
}  // namespace hash_wgmma

bool lsh_hash_has_wgmma() { return has_body<hash_wgmma::hash_kernel<__nv_bfloat16, 4, 4>>(); }

bool lsh_hash_wgmma_supports(const LshHashParams& params) {
  DeviceTraits traits{};
  return current_device_traits(&traits) == cudaSuccess &&
         hash_wgmma_supports(params, traits, lsh_hash_has_wgmma());
}

int64_t lsh_hash_wgmma_workspace(const LshHashParams& params) {
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess) return 0;
  return packed_hash::packed_bytes(params, wgmma_packing(params, traits));
}

cudaError_t lsh_hash_wgmma(const LshHashParams& params, cudaStream_t stream) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const HashColumns columns = packed_hash::lane_columns(params);
  const auto packing = wgmma_packing(params, traits);
  if (params.x_dtype == DType::f16) {
    return hash_wgmma::choose<__half>(params, columns, packing, traits, stream);
  }
  return hash_wgmma::choose<__nv_bfloat16>(params, columns, packing, traits, stream);
}

}  // namespace reformer::kernels

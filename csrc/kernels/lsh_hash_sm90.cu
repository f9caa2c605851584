// The hash on Hopper's tensor cores: persistent blocks of independent warpgroups.
//
// The rotations of one head stay in shared memory, packed once per call into wgmma's swizzled
// tiles; blocks take contiguous runs of token tiles, head after head, so they reload them once or
// twice. A warpgroup holds 64 tokens as A operands in registers, loaded straight from global
// memory, and the next 64 on their way. It multiplies them by one chunk of columns after the other
// and searches the products, in registers, for the largest absolute value of each factor.
//
// The search, not the multiply, sets the pace (ncu: ALU pipe 75% busy, tensor pipe 28%): hence the
// care about its instructions, and warpgroups out of step rather than a second set of accumulators,
// which was slower.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "lsh_hash_packed.h"
#include "lsh_hash_search.cuh"
#include "wgmma.cuh"

namespace reformer::kernels {
namespace hash_sm90 {
namespace {

using namespace packed_hash;

constexpr int kTokens = 64;       // of a warpgroup's tile
constexpr int kAlignment = 1024;  // of swizzled tiles

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

// ---- wgmma

template <int kChunk>
using Products = float[kChunk][4];  // 64 tokens by a chunk's columns; layout: wgmma.cuh

#define REFORMER_OPERANDS_12(d)                                                                   \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),       \
      "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),   \
      "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),   \
      "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),   \
      "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),   \
      "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),   \
      "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]), \
      "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]),             \
      "+f"(d[11][3])
#define REFORMER_REGISTERS_12                                                                \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"  \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
  "%46,%47}"
#define REFORMER_WGMMA(type)                                                                   \
  asm volatile(                                                                                \
      "{.reg .pred p; setp.ne.b32 p, %53, 0; wgmma.mma_async.sync.aligned.m64n96k16.f32." type \
      "." type " " REFORMER_REGISTERS_12 ", {%48,%49,%50,%51}, %52, p, 1, 1, 0;}"              \
      : REFORMER_OPERANDS_12(products)                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tiled::full_descriptor(b)),            \
        "r"(static_cast<int>(accumulate)))

// products (+)= A B^T for K = 16; b: descriptor of the chunk's columns.
template <typename T>
__device__ __forceinline__ void multiply_k16(Products<12>& products, const uint32_t (&a)[4],
                                             uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    REFORMER_WGMMA("f16");
  } else {
    REFORMER_WGMMA("bf16");
  }
}
template <typename T>
__device__ __forceinline__ void multiply_k16(Products<8>& products, const uint32_t (&a)[4],
                                             uint32_t b, bool accumulate) {
  tiled::wgmma_k16<T, 0>(products, a, b, accumulate);
}

#undef REFORMER_WGMMA
#undef REFORMER_REGISTERS_12
#undef REFORMER_OPERANDS_12

// Keeps the compiler from reading products before the wait that precedes this call.
template <int kChunk>
__device__ __forceinline__ void pin(Products<kChunk>& products) {
#pragma unroll
  for (int tile = 0; tile < kChunk; ++tile) {
    asm volatile(""
                 : "+f"(products[tile][0]), "+f"(products[tile][1]), "+f"(products[tile][2]),
                   "+f"(products[tile][3])::"memory");
  }
}

// The first token of the thread's warp in a warpgroup's tile, and its batch.
struct TokenTile {
  int64_t batch;
  int first;

  __device__ TokenTile(int tile, int tiles_per_sequence) {
    batch = tile / tiles_per_sequence;
    first = tile % tiles_per_sequence * kTokens + threadIdx.x % 128 / 32 * 16;
  }
};

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

// products = tokens * chunk^T, issued as one group.
template <typename T, int kSteps, int kChunk>
__device__ __forceinline__ void multiply(Products<kChunk>& products,
                                         const uint32_t (&tokens)[kSteps][4], uint32_t chunk,
                                         uint32_t half_stride) {
  tiled::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_k16<T>(products, tokens[step],
                    chunk + step / 4 * half_stride + step % 4 * tiled::kStepKMajor, step > 0);
  }
  tiled::wgmma_commit();
}

#endif  // REFORMER_HASH_SM90A

// kSteps: D / 16, rounded up to 2, 4, 8 or 16. Token tiles are numbered by head, then by batch.
template <typename T, int kSteps, class Factors>
__global__ __launch_bounds__(launch_bound(kSteps),
                             1) void hash_kernel(const __grid_constant__ LshHashParams params,
                                                 const __grid_constant__ HashColumns columns,
                                                 const __grid_constant__ Packing packing,
                                                 int tiles_per_sequence, OpaqueZero zero) {
#ifdef REFORMER_HASH_SM90A
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int kChunk = Factors::kChunk, kWarpgroups = warpgroups(kSteps);
  constexpr bool kPrefetch = kSteps <= 8;  // registers hold the next tokens too
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-tiled::shared_address(unaligned) & (kAlignment - 1));
  const uint32_t rotations = tiled::tile_descriptor(tiled::shared_address(shared));
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
    int tile = begin + warpgroup;
    if (tile >= end) continue;
    const auto token_tile = [&](int index) {
      return TokenTile(index - head_tile, tiles_per_sequence);
    };

    Tokens<1, kSteps> next;
    Operands<1, kSteps> operands;
    int next_tile = tile;
    const auto load_next = [&] {
      const TokenTile now = token_tile(next_tile);
      load_tokens<1, kSteps>(next, params, now.batch, head, now.first);
      next_tile = min(next_tile + kWarpgroups, end - 1);  // past the end: not used
    };
    const auto take_next = [&] {
      if constexpr (!kPrefetch) load_next();
      to_operands<1, kSteps>(operands, next);
      if constexpr (kPrefetch) load_next();
    };
    if constexpr (kPrefetch) load_next();
    take_next();

    Search<Factors, 1> search(params, columns, head, first_round, rounds, zero);
    Products<kChunk> products;
    for (; tile < end; tile += kWarpgroups) {
      const TokenTile now = token_tile(tile);
      search.start(now.batch, now.first);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        multiply<T, kSteps, kChunk>(products, operands[0], rotations + chunk * kChunkStride,
                                    half_stride);
        tiled::wgmma_wait<0>();
        pin<kChunk>(products);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) search.take(i, &products[i]);
      }
      take_next();
    }
  }
#endif
}

// ---- Host

// Calls f with the kind of factors that the kernels know for these columns.
template <class Function>
auto with_factors(const LshHashParams& params, const HashColumns& columns, const Function& f) {
  using Any = AnyFactors<8>;
  if (params.head_dim > 128) return f(Any{});
  // The sizes of default_n_buckets, 4 to 2^15 chunks.
  if (StaticFactors<8, 1, 1>::match(columns)) return f(StaticFactors<8, 1, 1>{});
  if (StaticFactors<12, 1, 2>::match(columns)) return f(StaticFactors<12, 1, 2>{});
  if (StaticFactors<8, 2, 2>::match(columns)) return f(StaticFactors<8, 2, 2>{});
  if (StaticFactors<12, 2, 4>::match(columns)) return f(StaticFactors<12, 2, 4>{});
  if (StaticFactors<8, 4, 4>::match(columns)) return f(StaticFactors<8, 4, 4>{});
  if (StaticFactors<8, 1, 1, 2>::match(columns)) return f(StaticFactors<8, 1, 1, 2>{});
  if (StaticFactors<12, 2, 2, 2>::match(columns)) return f(StaticFactors<12, 2, 2, 2>{});
  return f(Any{});
}

Packing packing_for(const LshHashParams& params, const HashColumns& columns,
                    const DeviceTraits& traits) {
  const int chunk_tiles =
      with_factors(params, columns, [](auto factors) { return decltype(factors)::kChunk; });
  return make_packing(params, columns, chunk_tiles, traits.shared_memory - kAlignment);
}

template <typename T, int kSteps, class Factors>
cudaError_t launch(const LshHashParams& params, const HashColumns& columns, const Packing& packing,
                   const DeviceTraits& traits, cudaStream_t stream) {
  constexpr int kWarpgroups = warpgroups(kSteps);
  const auto kernel = hash_kernel<T, kSteps, Factors>;
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
cudaError_t choose_steps(const LshHashParams& params, const HashColumns& columns,
                         const Packing& packing, const DeviceTraits& traits, cudaStream_t stream) {
  if (params.head_dim > 128) {
    return launch<T, 16, AnyFactors<8>>(params, columns, packing, traits, stream);
  }
  return with_factors(params, columns, [&](auto factors) {
    using Factors = decltype(factors);
    if (params.head_dim <= 32) {
      return launch<T, 2, Factors>(params, columns, packing, traits, stream);
    }
    if (params.head_dim <= 64) {
      return launch<T, 4, Factors>(params, columns, packing, traits, stream);
    }
    return launch<T, 8, Factors>(params, columns, packing, traits, stream);
  });
}

}  // namespace
}  // namespace hash_sm90

bool lsh_hash_sm90_supports(const LshHashParams& params) {
  if (!packed_hash::suits(params)) return false;
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess || traits.major != 9 || traits.minor != 0) {
    return false;
  }
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::packing_for(params, columns, traits);
  return packing.rounds > 0 && packing.groups <= 65535 &&
         has_body<hash_sm90::hash_kernel<__nv_bfloat16, 4, hash_sm90::AnyFactors<8>>>();
}

int64_t lsh_hash_sm90_workspace(const LshHashParams& params) {
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess) return 0;
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::packing_for(params, columns, traits);
  return packed_hash::packed_bytes(params, packing);
}

cudaError_t lsh_hash_sm90(const LshHashParams& params, cudaStream_t stream) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::packing_for(params, columns, traits);
  if (params.x_dtype == DType::f16) {
    return hash_sm90::choose_steps<__half>(params, columns, packing, traits, stream);
  }
  return hash_sm90::choose_steps<__nv_bfloat16>(params, columns, packing, traits, stream);
}

}  // namespace reformer::kernels

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
#include <iterator>
#include <type_traits>

#include "launch.cuh"
#include "lsh_hash_columns.h"
#include "wgmma.cuh"

namespace reformer::kernels {
namespace hash_sm90 {

// ---- Factors

// The tiles of a chunk whose factors are known at compile time. A chunk must be whole rounds.
template <int kChunkTiles, int... kFactorTiles>
struct StaticFactors {
  static constexpr bool kStatic = true;
  static constexpr int kChunk = kChunkTiles;
  static_assert(kChunk % (kFactorTiles + ...) == 0, "a round must not straddle chunks");

  static bool match(const HashColumns& columns) {
    constexpr int kTiles[] = {kFactorTiles...};
    if (columns.n_factors != sizeof...(kFactorTiles)) return false;
    return std::equal(
        std::begin(kTiles), std::end(kTiles), columns.factors,
        [](int tiles, const HashColumns::Factor& factor) { return tiles == factor.tiles; });
  }

  // Per tile one bit: it begins a factor, it ends one, it ends a round. Per tile four bits: its
  // factor, and the tile its factor begins with.
  struct Map {
    uint32_t begins = 0, ends = 0, ends_round = 0;
    uint64_t factor = 0, first_tile = 0;
  };
  static constexpr Map map() {
    constexpr int kTiles[] = {kFactorTiles...};
    constexpr int kFactors = sizeof...(kFactorTiles);
    Map map;
    for (int tile = 0, f = 0; tile < kChunk; tile += kTiles[f], f = (f + 1) % kFactors) {
      const int last = tile + kTiles[f] - 1;
      map.begins |= 1u << tile;
      map.ends |= 1u << last;
      if (f == kFactors - 1) map.ends_round |= 1u << last;
      for (int i = tile; i <= last; ++i) {
        map.factor |= uint64_t(f) << (4 * i);
        map.first_tile |= uint64_t(tile) << (4 * i);
      }
    }
    return map;
  }
  static constexpr uint32_t kBegins = map().begins, kEnds = map().ends,
                            kEndsRound = map().ends_round;
  static constexpr uint64_t kFactor = map().factor, kFirstTile = map().first_tile;
};

// Any others: the walk through them is kept at run time.
struct AnyFactors {
  static constexpr bool kStatic = false;
  static constexpr int kChunk = 8;
};

namespace {

constexpr int kTokens = 64;       // of a warpgroup's tile
constexpr int kTileColumns = 8;   // columns of an accumulator's tile
constexpr int kRowBytes = 128;    // of one packed column: 64 elements
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

// ---- Packed rotations
//
// [rotation head][group of rounds][64 elements of D][column][64]: 16-byte pieces swizzled as wgmma
// wants them, columns in the order of HashColumns padded to whole chunks with zeros. The elements
// of a row are permuted so that a thread's 16-byte loads of x are its A operands: lane q of four
// holds elements 8 q to 8 q + 7 of every 32, which serve as its columns 2 q, 2 q + 1, 2 q + 8 and
// 2 q + 9 of two multiplies.

// The element of D that stands at index k of a packed row.
__host__ __device__ constexpr int element_at(int k) {
  const int multiply = k / 16 % 2, lane = k % 8 / 2, upper = k % 16 / 8;
  return k / 32 * 32 + lane * 8 + multiply * 4 + upper * 2 + k % 2;
}

struct Packing {
  int halves;   // 64-element parts of D
  int columns;  // of a group of rounds, padded
  int rounds;   // of a group
  int groups;

  __host__ __device__ int64_t group_bytes() const { return int64_t{halves} * columns * kRowBytes; }
};

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

  const int round = group * packing.rounds + column / kTileColumns / columns.tiles_per_round;
  int tile = column / kTileColumns % columns.tiles_per_round, factor = 0;
  while (tile >= columns.factors[factor].tiles) tile -= columns.factors[factor++].tiles;
  const int factor_column = tile * kTileColumns + column % kTileColumns;
  const bool real = column < packing.rounds * columns.tiles_per_round * kTileColumns &&
                    round < params.rounds && factor_column < columns.factors[factor].columns;

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

// 0.0f where the compiler cannot see it: see take_larger.
struct OpaqueZero {
  float value;
};

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
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(sm90::full_descriptor(b)),             \
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
  sm90::wgmma_k16<T, 0>(products, a, b, accumulate);
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

// ---- Tokens

// A thread's share of 64 tokens: rows 2 g and 2 g + 1 of its warp's 16 (g = lane / 4), as
// accumulator rows g and g + 8, so that neighbouring lanes hold neighbouring tokens.
template <int kSteps>
using Tokens = uint4[2][kSteps / 2];

struct TokenTile {
  int64_t batch;
  int first;  // the thread's first token

  __device__ TokenTile(int tile, int tiles_per_sequence) {
    batch = tile / tiles_per_sequence;
    first = tile % tiles_per_sequence * kTokens + threadIdx.x % 128 / 32 * 16 +
            threadIdx.x % 32 / 4 * 2;
  }
};

template <int kSteps>
__device__ __forceinline__ void load_tokens(Tokens<kSteps>& tokens, const LshHashParams& params,
                                            int64_t head, const TokenTile& tile) {
  const int quad_lane = threadIdx.x % 4, head_dim = static_cast<int>(params.head_dim);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t token = tile.first + row;
    const uint16_t* x = static_cast<const uint16_t*>(params.x) + tile.batch * params.x_stride_b +
                        head * params.x_stride_h + token * params.x_stride_l;
#pragma unroll
    for (int part = 0; part < kSteps / 2; ++part) {
      const int element = part * 32 + quad_lane * 8;
      tokens[row][part] = make_uint4(0, 0, 0, 0);
      if (token < params.length && element < head_dim) {
        tokens[row][part] = __ldg(reinterpret_cast<const uint4*>(x + element));
      }
    }
  }
}

template <int kSteps>
__device__ __forceinline__ void to_operands(uint32_t (&operands)[kSteps][4],
                                            const Tokens<kSteps>& tokens) {
#pragma unroll
  for (int part = 0; part < kSteps / 2; ++part) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      operands[2 * part][row] = tokens[row][part].x;
      operands[2 * part][row + 2] = tokens[row][part].y;
      operands[2 * part + 1][row] = tokens[row][part].z;
      operands[2 * part + 1][row + 2] = tokens[row][part].w;
    }
  }
}

// ---- Search for the largest column

// if (|value| > |best.value|) best = {value, column}: strictly, so that the lowest of equal columns
// stays. The conditional moves are written as additions of zero, which the otherwise idle FMA pipe
// executes: the ALU pipe would be the bottleneck. column < 2^23 is added as a denormal number;
// adding -0.0 keeps -0.0 too.
__device__ __forceinline__ void take_larger(LargestColumn& best, float value, int column,
                                            OpaqueZero zero) {
  asm("{.reg .pred larger; .reg .f32 a, b, c;"
      " abs.f32 a, %2; abs.f32 b, %0; setp.gt.f32 larger, a, b; mov.b32 c, %1;"
      " @larger add.rn.f32 %0, %2, %5; @larger add.rn.f32 c, %4, %3; mov.b32 %1, c;}"
      : "+f"(best.value), "+r"(best.column)
      : "f"(value), "f"(__int_as_float(column)), "f"(zero.value), "f"(-zero.value));
}

__device__ __forceinline__ LargestColumn larger(LargestColumn a, LargestColumn b) {
  const float x = fabsf(a.value), y = fabsf(b.value);
  return y > x || (y == x && b.column < a.column) ? b : a;
}

__device__ __forceinline__ LargestColumn from_lane_xor(LargestColumn best, int mask) {
  return {__shfl_xor_sync(0xffffffff, best.value, mask),
          __shfl_xor_sync(0xffffffff, best.column, mask)};
}

// Over the four lanes that share two rows: lanes 0 and 2 get the first row's, lanes 1 and 3 the
// second's.
__device__ __forceinline__ LargestColumn largest_of_quad(const LargestColumn (&best)[2]) {
  const bool second = threadIdx.x % 2 == 1;
  LargestColumn mine = second ? best[1] : best[0];
  mine = larger(mine, from_lane_xor(second ? best[0] : best[1], 1));
  return larger(mine, from_lane_xor(mine, 2));
}

// The state of the search through one tile of tokens.
template <class Factors>
class Search {
 public:
  static constexpr int kChunk = Factors::kChunk;

  __device__ __forceinline__ Search(const LshHashParams& params, const HashColumns& columns,
                                    int64_t head, int first_round, int rounds, OpaqueZero zero)
      : params_(params),
        columns_(columns),
        head_(head),
        first_round_(first_round),
        rounds_(rounds),
        zero_(zero) {}

  __device__ __forceinline__ void start(const TokenTile& tile) {
    const int token = tile.first + static_cast<int>(threadIdx.x % 2);
    const int64_t sequence = tile.batch * params_.heads + head_;
    buckets_ =
        params_.buckets + (sequence * params_.rounds + first_round_) * params_.length + token;
    stores_ = threadIdx.x % 4 < 2 && token < params_.length;
    is_padding_ = stores_ && params_.key_padding_mask != nullptr &&
                  params_.key_padding_mask[tile.batch * params_.length + token];
    round_ = factor_ = bucket_ = first_column_ = 0;
    tiles_left_ = columns_.factors[0].tiles;
    best_[0] = best_[1] = {0.0f, 0};
  }

  // Takes a chunk of products; stores the buckets of the rounds it completes.
  __device__ __forceinline__ void take(const Products<kChunk>& products) {
#pragma unroll
    for (int tile = 0; tile < kChunk; ++tile) {
      const int column = tile * kTileColumns;
      if constexpr (Factors::kStatic) {
        const bool begins = Factors::kBegins >> tile & 1;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (begins) {
            best_[row] = {products[tile][2 * row], column};
          } else {
            take_larger(best_[row], products[tile][2 * row], column, zero_);
          }
          take_larger(best_[row], products[tile][2 * row + 1], column + 1, zero_);
        }
        if (Factors::kEnds >> tile & 1) {
          finish_factor(Factors::kFactor >> (4 * tile) & 15,
                        static_cast<int>(Factors::kFirstTile >> (4 * tile) & 15) * kTileColumns,
                        Factors::kEndsRound >> tile & 1);
        }
      } else {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          take_larger(best_[row], products[tile][2 * row], column, zero_);
          take_larger(best_[row], products[tile][2 * row + 1], column + 1, zero_);
        }
        if (--tiles_left_ == 0) {
          const bool last = factor_ == columns_.n_factors - 1;
          finish_factor(factor_, first_column_, last);
          factor_ = last ? 0 : factor_ + 1;
          tiles_left_ = columns_.factors[factor_].tiles;
          first_column_ = column + kTileColumns;
          best_[0] = best_[1] = {0.0f, first_column_};
        }
      }
    }
    if constexpr (!Factors::kStatic) {
      // Columns count from the chunk's start.
      first_column_ -= kChunk * kTileColumns;
      best_[0].column -= kChunk * kTileColumns;
      best_[1].column -= kChunk * kTileColumns;
    }
  }

 private:
  __device__ __forceinline__ void finish_factor(int index, int first_column, bool last) {
    const HashColumns::Factor& factor = columns_.factors[index];
    LargestColumn mine[2] = {best_[0], best_[1]};
    mine[0].column += static_cast<int>(threadIdx.x % 4) * 2 - first_column;
    mine[1].column += static_cast<int>(threadIdx.x % 4) * 2 - first_column;
    const LargestColumn best = largest_of_quad(mine);
    // NaN products may leave a padding column: any digit will do, but a digit.
    const int column = min(best.column, factor.columns - 1);
    bucket_ += factor.place * (column + (best.value < 0.0f ? factor.columns : 0));
    if (!last) return;
    if (stores_ && round_ < rounds_) *buckets_ = is_padding_ ? columns_.padding_bucket : bucket_;
    buckets_ += params_.length;
    bucket_ = 0;
    ++round_;
  }

  const LshHashParams& params_;
  const HashColumns& columns_;
  const int64_t head_;
  const int first_round_, rounds_;
  const OpaqueZero zero_;
  int32_t* buckets_;  // of this lane's token in the current round
  bool stores_, is_padding_;
  int bucket_, round_;
  LargestColumn best_[2];
  int factor_, tiles_left_, first_column_;  // AnyFactors
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
  sm90::fence_shared_for_wgmma();
  __syncthreads();
}

// products = tokens * chunk^T, issued as one group.
template <typename T, int kSteps, int kChunk>
__device__ __forceinline__ void multiply(Products<kChunk>& products,
                                         const uint32_t (&tokens)[kSteps][4], uint32_t chunk,
                                         uint32_t half_stride) {
  sm90::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_k16<T>(products, tokens[step],
                    chunk + step / 4 * half_stride + step % 4 * sm90::kStepKMajor, step > 0);
  }
  sm90::wgmma_commit();
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
  char* shared = unaligned + (-sm90::shared_address(unaligned) & (kAlignment - 1));
  const uint32_t rotations = sm90::tile_descriptor(sm90::shared_address(shared));
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

    Tokens<kSteps> next;
    uint32_t operands[kSteps][4];
    int next_tile = tile;
    const auto load_next = [&] {
      load_tokens<kSteps>(next, params, head, token_tile(next_tile));
      next_tile = min(next_tile + kWarpgroups, end - 1);  // past the end: not used
    };
    const auto take_next = [&] {
      if constexpr (!kPrefetch) load_next();
      to_operands<kSteps>(operands, next);
      if constexpr (kPrefetch) load_next();
    };
    if constexpr (kPrefetch) load_next();
    take_next();

    Search<Factors> search(params, columns, head, first_round, rounds, zero);
    Products<kChunk> products;
    for (; tile < end; tile += kWarpgroups) {
      search.start(token_tile(tile));
      for (int chunk = 0; chunk < chunks; ++chunk) {
        multiply<T, kSteps, kChunk>(products, operands, rotations + chunk * kChunkStride,
                                    half_stride);
        sm90::wgmma_wait<0>();
        pin<kChunk>(products);
        search.take(products);
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
  if (params.head_dim > 128) return f(AnyFactors{});
  // The sizes of default_n_buckets, 4 to 2^15 chunks.
  if (StaticFactors<8, 1, 1>::match(columns)) return f(StaticFactors<8, 1, 1>{});
  if (StaticFactors<12, 1, 2>::match(columns)) return f(StaticFactors<12, 1, 2>{});
  if (StaticFactors<8, 2, 2>::match(columns)) return f(StaticFactors<8, 2, 2>{});
  if (StaticFactors<12, 2, 4>::match(columns)) return f(StaticFactors<12, 2, 4>{});
  if (StaticFactors<8, 4, 4>::match(columns)) return f(StaticFactors<8, 4, 4>{});
  if (StaticFactors<8, 1, 1, 2>::match(columns)) return f(StaticFactors<8, 1, 1, 2>{});
  if (StaticFactors<12, 2, 2, 2>::match(columns)) return f(StaticFactors<12, 2, 2, 2>{});
  return f(AnyFactors{});
}

// Rounds go in groups whose packed rotations fit in shared memory. rounds == 0: not even one fits.
Packing make_packing(const LshHashParams& params, const HashColumns& columns,
                     int64_t shared_memory) {
  const int chunk_columns = kTileColumns * with_factors(params, columns, [](auto factors) {
                              return decltype(factors)::kChunk;
                            });
  Packing packing{};
  packing.halves = params.head_dim <= 64 ? 1 : params.head_dim <= 128 ? 2 : 4;
  const int64_t fitting_columns =
      (shared_memory - kAlignment) / (packing.halves * kRowBytes) / chunk_columns * chunk_columns;
  const int64_t round_columns = int64_t{columns.tiles_per_round} * kTileColumns;
  const int64_t fitting_rounds = std::min(fitting_columns / round_columns, params.rounds);
  if (fitting_rounds == 0) return packing;
  packing.groups = static_cast<int>(ceil_div(params.rounds, fitting_rounds));
  packing.rounds = static_cast<int>(ceil_div<int64_t>(params.rounds, packing.groups));
  packing.columns =
      static_cast<int>(round_up<int64_t>(packing.rounds * round_columns, chunk_columns));
  return packing;
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

  constexpr int kPackThreads = 256;
  const int64_t pieces = params.rotation_heads * packing.groups * packing.group_bytes() / 16;
  const auto pack_blocks = static_cast<unsigned>(ceil_div<int64_t>(pieces, kPackThreads));
  error = launch_overlapped(pack_kernel<T>, {pack_blocks, kPackThreads}, stream, params, columns,
                            packing);
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
    return launch<T, 16, AnyFactors>(params, columns, packing, traits, stream);
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
  constexpr int64_t kMaxHeadDim = 256;
  const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
  if (params.x_dtype == DType::f32 || params.x_dtype != params.rotations_dtype ||
      params.head_dim > kMaxHeadDim || params.head_dim % 8 != 0 ||
      reinterpret_cast<uintptr_t>(params.x) % 16 != 0 || !aligned(params.x_stride_b) ||
      !aligned(params.x_stride_h) || !aligned(params.x_stride_l)) {
    return false;
  }
  const int64_t tiles =
      params.batch * params.heads * ceil_div<int64_t>(params.length, hash_sm90::kTokens);
  if (tiles > INT32_MAX || params.length > INT32_MAX - hash_sm90::kTokens) return false;
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess || traits.major != 9 || traits.minor != 0) {
    return false;
  }
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::make_packing(params, columns, traits.shared_memory);
  return packing.rounds > 0 && packing.groups <= 65535 &&
         has_body<hash_sm90::hash_kernel<__nv_bfloat16, 4, hash_sm90::AnyFactors>>();
}

int64_t lsh_hash_sm90_workspace(const LshHashParams& params) {
  DeviceTraits traits{};
  if (current_device_traits(&traits) != cudaSuccess) return 0;
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::make_packing(params, columns, traits.shared_memory);
  return params.rotation_heads * packing.groups * packing.group_bytes();
}

cudaError_t lsh_hash_sm90(const LshHashParams& params, cudaStream_t stream) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const HashColumns columns(params, hash_sm90::kTileColumns);
  const auto packing = hash_sm90::make_packing(params, columns, traits.shared_memory);
  if (params.x_dtype == DType::f16) {
    return hash_sm90::choose_steps<__half>(params, columns, packing, traits, stream);
  }
  return hash_sm90::choose_steps<__nv_bfloat16>(params, columns, packing, traits, stream);
}

}  // namespace reformer::kernels

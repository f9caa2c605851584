// What the forward and backward passes of chunked attention for shared QK share, by wgmma and by
// mma.sync: the line of chunks a block walks along, the gather of a chunk's rows into shared
// memory, and the launch.
//
// One warpgroup walks a run of consecutive chunks of one head's line (its rounds laid end to end).
// Each row is gathered once per run and round, into a ring of three chunks, and serves there as
// query, as key and as look-back key.
#pragma once

#include "chunked_attention/stages.h"
#include "common/launch.cuh"
#include "tensor_core/tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define REFORMER_SM90A 1  // this pass compiles device code that may hold wgmma
#endif

namespace reformer::kernels::tiled {

inline constexpr int kThreads = 128;  // one warpgroup
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kSlots = 3;          // chunks in the ring of tiles
inline constexpr int kPositionSlots = 4;  // chunks in the ring of positions, one step further ahead

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr int kInvalidKey = 0x7fffffff;  // position of a key nobody may attend to

// A chunk's place: chunk `index` of round `round`.
struct Chunk {
  int round, index;
};

// The rounds of one head, each cut into chunks, laid end to end.
struct Line {
  int length, rounds, chunks_per_round;
  bool wrap;  // the first chunk follows the last; else rounds are not neighbours
  bool mask_self;

  __host__ __device__ int chunks() const { return rounds * chunks_per_round; }
  __device__ Chunk at(int position) const {
    if (position < 0) position += chunks();
    return {position / chunks_per_round, position % chunks_per_round};
  }
  __device__ Chunk next(Chunk chunk) const {
    if (++chunk.index == chunks_per_round) {
      chunk.index = 0;
      if (++chunk.round == rounds) chunk.round = 0;
    }
    return chunk;
  }
  // Rows of the chunk; the last one of a round may be short.
  __device__ int rows(Chunk chunk) const {
    return min(kTileRows, length - chunk.index * kTileRows);
  }
  __device__ bool has_previous(Chunk chunk) const { return wrap || chunk.index > 0; }
};

// The entry of a slot of a round, as it stands in the order, which is the head's [R, L], or null
// for the natural order: prefetched, it must not be looked at before it is needed. Slots past the
// end repeat the last row, so that whole chunks can be copied; Line::rows tells them apart.
__device__ __forceinline__ uint32_t order_at(const Line& line, const int32_t* order, int round,
                                             int slot) {
  slot = min(slot, line.length - 1);
  return order == nullptr ? slot : __ldg(order + int64_t{round} * line.length + slot);
}

// The sequence position that an entry of the order stands for.
__device__ __forceinline__ int position_of(const Line& line, uint32_t entry) {
  return static_cast<int>(min(entry, static_cast<uint32_t>(line.length - 1)));
}

// Rows of more than 64 columns lie in two tiles, one after the other.
template <int kHeadDim>
inline constexpr int kTilesPerRow = kHeadDim > 64 ? kHeadDim / 64 : 1;
template <int kHeadDim>
inline constexpr int kTileColumns = kHeadDim / kTilesPerRow<kHeadDim>;

// How a warpgroup copies the rows of a tile: each thread 16 bytes of every kRowsPerPass-th row.
template <int kHeadDim>
struct Copy {
  static constexpr int kThreadsPerRow = kTileColumns<kHeadDim> / 8;
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr int kRows = kTileRows / kRowsPerPass;  // per thread and tile
  using Positions = int[kRows];
};

// The positions of the rows that a thread copies.
template <int kHeadDim>
__device__ __forceinline__ void read_copied_positions(typename Copy<kHeadDim>::Positions& copied,
                                                      const int (&positions)[kTileRows],
                                                      uint32_t thread) {
#pragma unroll
  for (int i = 0; i < Copy<kHeadDim>::kRows; ++i) {
    copied[i] =
        positions[thread / Copy<kHeadDim>::kThreadsPerRow + i * Copy<kHeadDim>::kRowsPerPass];
  }
}

// Copies a chunk's rows into their tiles. Columns beyond the head dim keep what they held: products
// that sum over columns leave them out, and what others make of them is not stored.
template <int kHeadDim>
__device__ __forceinline__ void gather_tile(uint32_t tile, const uint8_t* rows, int row_bytes,
                                            const typename Copy<kHeadDim>::Positions& copied,
                                            uint32_t thread) {
  const uint32_t piece = thread % Copy<kHeadDim>::kThreadsPerRow;
  const uint32_t destination = tile + swizzled(thread / Copy<kHeadDim>::kThreadsPerRow, piece);
  rows += piece * 16;
#pragma unroll
  for (int i = 0; i < Copy<kHeadDim>::kRows; ++i) {
    const auto* source = indexed_address<const uint8_t>(rows, copied[i], row_bytes);
#pragma unroll
    for (int part = 0; part < kTilesPerRow<kHeadDim>; ++part) {
      copy_async<16>(destination + part * kTileBytes + i * Copy<kHeadDim>::kRowsPerPass * 128,
                     source + part * 128);
    }
  }
}

// Makes zeros of the rows of a tile that `is_unused`, by the warpgroup: what multiplies them is
// zero, and 0 * NaN is NaN.
template <class IsUnused>
__device__ __forceinline__ void clear_rows(uint8_t* tile, uint32_t thread,
                                           const IsUnused& is_unused) {
  const uint32_t row = thread / 2;
  if (!is_unused(row)) return;
  auto* const words = reinterpret_cast<uint4*>(tile + row * 128 + thread % 2 * 64);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = make_uint4(0, 0, 0, 0);
}

// Whether the query may attend to the key, given what key_bound and query_bound made of their
// positions.
template <bool kCausal>
__device__ __forceinline__ bool may_attend(int key, int query) {
  return kCausal ? key < query : key != query && key != kInvalidKey;
}

// causal: the first position out of reach; else the one position out of reach (none: -2, which no
// key has).
template <bool kCausal>
__device__ __forceinline__ int query_bound(const Line& line, int position) {
  if (kCausal) return line.mask_self ? position : position + 1;
  return line.mask_self ? position : -2;
}

// Chunks per block for `heads` lines on a device that holds `resident_blocks`: long runs gather
// little twice, short runs fill the device. A run costs its chunks and about one more for its
// start.
inline int run_length(int64_t heads, int line_chunks, int resident_blocks, int longest) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int length = 1; length <= longest; ++length) {
    const int64_t blocks = heads * ((line_chunks + length - 1) / length);
    const int64_t cost = (blocks + resident_blocks - 1) / resident_blocks * (length + 1);
    if (cost <= best_cost) {
      best_cost = cost;
      best = length;
    }
  }
  return best;
}

// Launches a pass over all lines of a stage. args.run_length is filled in. resident_blocks: of the
// kernel, per multiprocessor; 0: the device is asked.
template <typename Args>
cudaError_t launch_pass(void (*kernel)(Args), Args args, int64_t head_count, int threads,
                        int shared_bytes, int resident_blocks, int longest_run,
                        cudaStream_t stream) {
  DeviceTraits traits{};
  cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  if (resident_blocks == 0) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident_blocks, kernel, threads,
                                                          shared_bytes);
    if (error != cudaSuccess) return error;
    if (resident_blocks == 0) return cudaErrorLaunchOutOfResources;
  }
  const int chunks = args.line.chunks();
  args.run_length =
      run_length(head_count, chunks, traits.multiprocessors * resident_blocks, longest_run);
  const dim3 grid((chunks + args.run_length - 1) / args.run_length,
                  static_cast<unsigned>(head_count));
  return launch_overlapped(kernel, {grid, threads, shared_bytes}, stream, args);
}

// A [B, H, L, D] view in bytes.
struct Rows {
  const uint8_t* data;
  int64_t batch_bytes, head_bytes;
  int row_bytes;

  Rows(const HeadsView& view, int element_bytes)
      : data(static_cast<const uint8_t*>(view.data)),
        batch_bytes(view.stride_b * element_bytes),
        head_bytes(view.stride_h * element_bytes),
        row_bytes(static_cast<int>(view.stride_l * element_bytes)) {}
  __device__ const uint8_t* head(int batch, int head) const {
    return data + batch * batch_bytes + head * head_bytes;
  }
};

inline Line make_line(const ChunkedAttentionParams& params) {
  return {static_cast<int>(params.length), static_cast<int>(params.rounds),
          static_cast<int>((params.length + kTileRows - 1) / kTileRows),
          // A bucket is one round's: keys sorted in another round are not of the same.
          params.wrap && (params.buckets == nullptr || params.rounds == 1), params.mask_self};
}

// Calls launch(Element{}, integral_constant<int, head_dim>, bool_constant<causal>) for one of the
// head dims.
template <int... kHeadDims, typename Launch>
cudaError_t dispatch(const ChunkedAttentionParams& params, Launch launch) {
  const auto by_causal = [&](auto element, auto head_dim) {
    return params.causal ? launch(element, head_dim, std::true_type{})
                         : launch(element, head_dim, std::false_type{});
  };
  const auto by_head_dim = [&](auto element) {
    cudaError_t error = cudaErrorInvalidValue;
    const auto launch_if_equal = [&](auto head_dim) {
      if (params.head_dim == head_dim()) error = by_causal(element, head_dim);
    };
    (launch_if_equal(std::integral_constant<int, kHeadDims>{}), ...);
    return error;
  };
  switch (params.dtype) {
    case DType::f16:
      return by_head_dim(__half{});
    case DType::bf16:
      return by_head_dim(__nv_bfloat16{});
    case DType::f32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace reformer::kernels::tiled

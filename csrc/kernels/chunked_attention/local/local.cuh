// What the wgmma kernels of local attention share: which tiles of keys a tile of queries attends
// to, the copies of tiles into shared memory, and the way of results out of it.
//
// Rows are taken in their natural order, in tiles of 64 that never straddle chunks. All rows of a
// tile have the same window, a run of whole tiles. One round, so results are final: no partial sums
// and nothing to combine.
#pragma once

#include <cmath>

#include "chunked_attention/tiled/tiled.cuh"
#include "tensor_core/wgmma.cuh"

namespace reformer::kernels::tiled::local {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kCopyThreads = 256;  // of blocks that have more: rows divide among these

// Tiles [begin, end). With wrap it may begin before tile 0 or end past the last one:
// TileLine::fold.
struct Span {
  int begin, end;
  __device__ bool holds(int tile) const { return begin <= tile && tile < end; }
};

// The tiles of a sequence and the windows over them.
struct TileLine {
  int length, tiles, chunk_tiles, chunks, look_back, look_ahead;
  bool wrap, causal, mask_self;

  __device__ int64_t padded_length() const { return int64_t{tiles} * kTileRows; }
  __device__ int fold(int tile) const {
    return tile < 0 ? tile + tiles : tile >= tiles ? tile - tiles : tile;
  }
  // First tile of a chunk; chunks before 0 and past the last one continue the ring, whose last
  // chunk may be short.
  __device__ int chunk_begin(int chunk) const {
    if (chunk < 0) return (chunk + chunks) * chunk_tiles - tiles;
    return chunk < chunks ? chunk * chunk_tiles : tiles + (chunk - chunks) * chunk_tiles;
  }
  __device__ Span window(int tile, int before, int after) const {
    const int chunk = tile / chunk_tiles;
    const Span span = {chunk_begin(chunk - before), chunk_begin(chunk + after + 1)};
    if (wrap) return span;
    return {max(span.begin, 0), min(span.end, tiles)};
  }
  // The tiles that hold the keys of a tile of queries; both ends grow with the tile.
  __device__ Span keys_of(int tile) const {
    Span span = window(tile, look_back, look_ahead);
    if (causal && !wrap) span.end = min(span.end, tile + 1);
    return span;
  }
  // The tiles that hold the queries of a tile of keys; both ends grow with the tile.
  __device__ Span queries_of(int tile) const {
    Span span = window(tile, look_ahead, look_back);
    if (causal && !wrap) span.begin = max(span.begin, tile);
    return span;
  }
  // Of tiles in each other's window, whether any pair may attend.
  __device__ bool meet(int query_tile, int key_tile) const {
    return !causal || key_tile <= query_tile;
  }
};

inline TileLine make_tile_line(const ChunkedAttentionParams& params) {
  const int64_t tiles = ceil_div<int64_t>(params.length, kTileRows);
  const int64_t chunk_tiles =
      params.chunk_size < params.length ? params.chunk_size / kTileRows : tiles;
  const int64_t chunks = ceil_div(tiles, chunk_tiles);
  int64_t look_back = params.look_back < chunks ? params.look_back : chunks;
  int64_t look_ahead = params.look_ahead < chunks ? params.look_ahead : chunks;
  if (params.wrap && look_back + 1 + look_ahead >= chunks) {  // the whole ring, once
    look_back = 0;
    look_ahead = chunks - 1;
  }
  return {static_cast<int>(params.length),
          static_cast<int>(tiles),
          static_cast<int>(chunk_tiles),
          static_cast<int>(chunks),
          static_cast<int>(look_back),
          static_cast<int>(look_ahead),
          params.wrap,
          params.causal,
          params.mask_self};
}

// A tile of kHeadDim columns: halves of 64 columns each; 32 columns fill half of one.
template <int kHeadDim>
struct Shape {
  static constexpr int kHalves = kHeadDim <= 64 ? 1 : kHeadDim / 64;
  static constexpr int kColumns = kHeadDim / kHalves;  // of a half
  static constexpr int kSteps = kColumns / 16;         // of K = 16, over the columns of a half
  static constexpr int kPieces = kHeadDim / 8;         // of 16 bytes, in a row
  static constexpr int kBytes = kHalves * kTileBytes;
};
template <int kHeadDim>
using TileBytes = uint8_t[Shape<kHeadDim>::kBytes];
template <int kHeadDim>
using Output = AccumulatorOf<Shape<kHeadDim>::kColumns>[Shape<kHeadDim>::kHalves];

// ---- Copies

// Starts copying the tile's rows. Rows past the end repeat the last one.
template <int kHeadDim, int kThreads>
__device__ __forceinline__ void copy_tile(uint32_t tile, const uint8_t* rows, int row_bytes,
                                          int first_row, int length, uint32_t thread) {
  constexpr int kPieces = Shape<kHeadDim>::kPieces, kRowsPerPass = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRowsPerPass % 8 == 0 && kTileRows % kRowsPerPass == 0);
  const uint32_t piece = thread % kPieces, row = thread / kPieces;
  const uint32_t destination = tile + piece / 8 * kTileBytes + swizzled(row, piece % 8);
  rows += piece * 16;
#pragma unroll
  for (int i = 0; i < kTileRows / kRowsPerPass; ++i) {
    const int source = min(first_row + static_cast<int>(row) + i * kRowsPerPass, length - 1);
    copy_async<16>(destination + i * kRowsPerPass * 128,
                   indexed_address<const uint8_t>(rows, source, row_bytes));
  }
}

// Makes zeros of the tile's rows that `is_unused`, by kThreads threads: what multiplies them is
// zero, and 0 * NaN is NaN. For wgmma to see after the next barrier.
template <int kHeadDim, int kThreads, class IsUnused>
__device__ __forceinline__ void clear_unused_rows(TileBytes<kHeadDim>& tile,
                                                  const IsUnused& is_unused, uint32_t thread) {
  constexpr uint32_t kRowPieces = 8;  // of 16 bytes
#pragma unroll 1
  for (uint32_t i = thread; i < Shape<kHeadDim>::kHalves * kTileRows * kRowPieces; i += kThreads) {
    if (!is_unused(i / kRowPieces % kTileRows)) continue;
    reinterpret_cast<uint4*>(&tile)[i] = make_uint4(0, 0, 0, 0);
  }
  fence_shared_for_wgmma();
}

// Waits until at most kPending of this thread's committed copies are under way, shows the block's
// shared-memory writes to wgmma, and synchronises.
template <int kPending>
__device__ __forceinline__ void wait_for_copies_and_sync() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  fence_shared_for_wgmma();
  __syncthreads();
}

// The position of a key, kInvalidKey if there is none or it is padding. padding: the sequence's, or
// null.
__device__ __forceinline__ int key_position(const bool* padding, int position, int length) {
  if (position >= length) return kInvalidKey;
  return padding != nullptr && padding[position] ? kInvalidKey : position;
}

// ---- Products

// scores = A B^T over all columns; A in shared memory.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void multiply_rows(Accumulator& scores, uint32_t a, uint32_t b) {
  using Tile = Shape<kHeadDim>;
#pragma unroll
  for (int i = 0; i < Tile::kHalves * Tile::kSteps; ++i) {
    const uint32_t offset = i / Tile::kSteps * (kTileBytes >> 4) + i % Tile::kSteps * kStepKMajor;
    wgmma_k16<Element, 0, 0>(scores, a + offset, b + offset, i > 0);
  }
  wgmma_commit();
}

// output += A B, all columns of B.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void accumulate_rows(Output<kHeadDim>& output, const Fragments& a,
                                                uint32_t b) {
#pragma unroll
  for (int half = 0; half < Shape<kHeadDim>::kHalves; ++half) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_k16<Element, 1>(output[half], a[k], b + half * (kTileBytes >> 4) + k * kStepMnMajor,
                            true);
    }
  }
  wgmma_commit();
}

template <int kHalves, int kGroups>
__device__ __forceinline__ void pin(float (&output)[kHalves][kGroups][4]) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half) tiled::pin(output[half]);
}

template <int kHalves, int kGroups>
__device__ __forceinline__ void clear(float (&output)[kHalves][kGroups][4]) {
#pragma unroll
  for (int i = 0; i < kHalves * kGroups * 4; ++i) {
    output[i / 4 / kGroups][i / 4 % kGroups][i % 4] = 0.0F;
  }
}

// Multiplies the thread's two rows.
template <int kHalves, int kGroups>
__device__ __forceinline__ void scale_rows(float (&output)[kHalves][kGroups][4],
                                           const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < kHalves * kGroups * 4; ++i) {
    output[i / 4 / kGroups][i / 4 % kGroups][i % 4] *= factors[i % 4 / 2];
  }
}

// Clears the thread's columns of one of its two rows.
template <int kHalves, int kGroups>
__device__ __forceinline__ void clear_row(float (&output)[kHalves][kGroups][4], int row) {
#pragma unroll
  for (int i = 0; i < kHalves * kGroups * 4; ++i) {
    if (i % 4 / 2 == row) output[i / 4 / kGroups][i / 4 % kGroups][i % 4] = 0.0F;
  }
}

// Sets the scores of a tile of queries with a tile of keys, rows and columns, to -inf where the
// query may not attend: to itself under mask_self, to later positions if causal, to kInvalidKey.
__device__ __forceinline__ void mask_scores(Accumulator& scores, const TileLine& line,
                                            const int* key_positions, int upper_query,
                                            uint32_t thread) {
  const auto mask = [&](auto attends) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int2 keys = *reinterpret_cast<const int2*>(&key_positions[8 * j + thread % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = e % 2 == 0 ? keys.x : keys.y, query = upper_query + e / 2 * 8;
        if (!attends(query, key)) scores[j][e] = -INFINITY;
      }
    }
  };
  if (line.causal) {
    const int reach = line.mask_self ? 0 : 1;
    mask([&](int query, int key) { return key < query + reach; });
  } else if (line.mask_self) {
    mask([](int query, int key) { return key != query && key != kInvalidKey; });
  } else {
    mask([](int, int key) { return key != kInvalidKey; });
  }
}

// ---- Results

// Adds the thread's columns of a row in global memory to one of its two rows.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void add_row(Output<kHeadDim>& output, int row, const uint8_t* source,
                                        uint32_t thread) {
  using Tile = Shape<kHeadDim>;
#pragma unroll
  for (int half = 0; half < Tile::kHalves; ++half) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const uint32_t column = half * 64 + 8 * j + thread % 4 * 2;
      const float2 pair =
          unpack<Element>(*reinterpret_cast<const uint32_t*>(source + column * sizeof(Element)));
      output[half][j][2 * row] += pair.x;
      output[half][j][2 * row + 1] += pair.y;
    }
  }
}

// Writes the warp's 16 rows of a result to global memory, those before the end, through its 16 rows
// of a tile of shared memory that nobody else uses.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void store_result(const Output<kHeadDim>& output, uint8_t* tile,
                                             uint8_t* rows, int row_bytes, int first_row,
                                             int length, uint32_t thread) {
  using Tile = Shape<kHeadDim>;
  const uint32_t lane = thread % 32, warp_row = thread / 32 * 16;
#pragma unroll
  for (int half = 0; half < Tile::kHalves; ++half) {
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &output[half][2 * k + i / 2][i % 2 * 2];
        words[i] = pack<Element>(pair[0], pair[1]);
      }
      store_matrices(shared_address(tile) + half * kTileBytes +
                         swizzled(warp_row + lane % 16, 2 * k + lane / 16),
                     words);
    }
  }
  __syncwarp();
  constexpr int kPieces = Tile::kPieces, kRowsPerPass = 32 / kPieces;
  const uint32_t piece = lane % kPieces;
#pragma unroll
  for (int i = 0; i < 16 / kRowsPerPass; ++i) {
    const uint32_t row = warp_row + i * kRowsPerPass + lane / kPieces;
    const uint4 words =
        *reinterpret_cast<const uint4*>(tile + piece / 8 * kTileBytes + swizzled(row, piece % 8));
    const int position = first_row + static_cast<int>(row);
    // Streamed: the inputs are read again, results are not.
    if (position < length) {
      __stcs(indexed_address<uint4>(rows + piece * 16, position, row_bytes), words);
    }
  }
  __syncwarp();
}

}  // namespace reformer::kernels::tiled::local

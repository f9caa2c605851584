// What the generic forward and backward kernels share: the line of chunks and its windows, the
// rules by which a query attends to a key, and the gather of rows into shared memory.
//
// A block takes a tile of consecutive slots of one round (its rows, resident) and walks over the
// slots of the line that their windows cover (the columns, streamed). Tiles need not be aligned to
// chunks.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "chunked_attention/stages.h"
#include "common/dropout.h"
#include "common/dtype.cuh"
#include "tensor_core/mma.cuh"

namespace reformer::kernels::generic {

inline constexpr float kLog2e = 1.4426950408889634f;

// 2^x to 2 units in the last place, 0 for what would be denormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A weight from its logit and the final lse, in log2 units. Both are rounded: no weight is
// beyond 1.
__device__ __forceinline__ float weight_of(float logit, float lse) {
  float exponent = logit - lse;
  asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(exponent));
  return exp2_approx(exponent);
}

// A range of slots. It may begin before slot 0 or end past the last one: the line is a ring.
struct Span {
  int begin, end;
};

// The sorted rounds laid end to end: slots 0 .. rounds * length - 1. Every round is cut into
// n_chunks chunks, the last of which may be short.
struct Line {
  int length, rounds, n_chunks, chunk_size, look_back, look_ahead;
  bool wrap;

  __host__ __device__ int slots() const { return rounds * length; }

  // The ring's slot for one at most a line's length out of range.
  __device__ __forceinline__ int fold(int slot) const {
    return slot < 0 ? slot + slots() : slot >= slots() ? slot - slots() : slot;
  }

  // First slot of any chunk; chunks before 0 and past the last one continue the line.
  __device__ __forceinline__ int chunk_begin(int chunk) const {
    const int round = chunk >= 0 ? chunk / n_chunks : -((n_chunks - 1 - chunk) / n_chunks);
    return round * length + (chunk - round * n_chunks) * chunk_size;
  }

  // The chunks from `before` chunks before the slot's own to `after` chunks after it.
  __device__ __forceinline__ Span window(int slot, int before, int after) const {
    const int round = slot / length;
    const int chunk = round * n_chunks + (slot - round * length) / chunk_size;
    const Span span = {chunk_begin(chunk - before), chunk_begin(chunk + after + 1)};
    if (wrap) return span;
    return {max(span.begin, round * length), min(span.end, (round + 1) * length)};
  }
};

// Clamps the sizes so that a window never holds a chunk twice and all arithmetic on slots fits an
// int.
inline Line make_line(const ChunkedAttentionParams& params) {
  const int64_t chunk_size = params.chunk_size < params.length ? params.chunk_size : params.length;
  const int64_t n_chunks = (params.length + chunk_size - 1) / chunk_size;
  const int64_t chunks = params.wrap ? n_chunks * params.rounds : n_chunks;
  int64_t look_back = params.look_back < chunks ? params.look_back : chunks;
  int64_t look_ahead = params.look_ahead < chunks ? params.look_ahead : chunks;
  if (params.wrap && look_back + 1 + look_ahead >= chunks) {  // the whole ring, once
    look_back = 0;
    look_ahead = chunks - 1;
  }
  return {static_cast<int>(params.length),
          static_cast<int>(params.rounds),
          static_cast<int>(n_chunks),
          static_cast<int>(chunk_size),
          static_cast<int>(look_back),
          static_cast<int>(look_ahead),
          params.wrap};
}

// The rows of a block: consecutive slots [begin, end) of one round of one sequence.
struct Rows {
  int head;  // within the stage's group
  int round, begin, end;

  __device__ Rows(const Line& line, int rows) {
    const int tiles = (line.length + rows - 1) / rows;
    const int tile = blockIdx.x % tiles, round_and_head = blockIdx.x / tiles;
    round = round_and_head % line.rounds;
    head = round_and_head / line.rounds;
    begin = round * line.length + tile * rows;
    end = min(begin + rows, (round + 1) * line.length);
  }
};

// Tiles of a stage: its blocks.
inline int64_t row_tiles(const Line& line, int64_t heads, int rows) {
  return heads * line.rounds * ((line.length + rows - 1) / rows);
}

// The columns a block walks over, and each row's part of them.
struct Columns {
  int begin, count;
  int before, after;
  bool same_for_all_rows;

  __device__ Columns(const Line& line, const Rows& rows, int before, int after)
      : before(before), after(after) {
    const Span first = line.window(rows.begin, before, after);
    const Span last = line.window(rows.end - 1, before, after);
    begin = first.begin;
    count = min(last.end - first.begin, line.slots());
    same_for_all_rows = first.begin == last.begin && first.end == last.end;
  }
};

// A row's window in columns; past the last column it goes on from the first one.
struct Window {
  int begin, count;

  __device__ __forceinline__ bool holds(int column, int slots) const {
    const int offset = column - begin;
    return (offset < 0 ? offset + slots : offset) < count;
  }
};

struct alignas(16) Key {
  int token;        // position, -1 where there is no key to attend to
  float scale;      // what makes the row a key: 1 / |q| for shared QK, else 1
  int bucket;       // in the rows' round
  bool non_finite;  // see isolate_non_finite
};

struct alignas(16) Query {
  int token;       // position, -1 where there is no query
  uint32_t limit;  // attends to positions below it
  int excluded;    // but not to this one: itself under mask_self, else -1
  int bucket;      // in the rows' round
  uint32_t dropout_key;
  float lse, delta;  // backward only, see RowStats
  bool non_finite;
};

// One head of one sequence: where its rows are, and who may attend to whom. Kept in shared memory,
// since its pointers would cost registers that the accumulators need.
template <typename T>
struct Sequence {
  Line line;
  uint32_t head_index, batch, head;  // head_index = batch * heads + head
  const T *q, *k, *v;
  int64_t stride_q, stride_k, stride_v;
  const int32_t* order;          // [R, L]
  const int32_t* buckets;        // [R, L]
  const int32_t* chunk_numbers;  // [L, R]; null unless duplicates are corrected
  const bool* padding;           // [L]
  const float* key_scale;        // [L], key_scale_stride apart; null: 1
  int key_scale_stride;
  bool causal, mask_self, drop_zero_keys;
  float log2_scale;  // of q . k, to logits in log2 units
  uint64_t dropout_seed;
  uint32_t dropout_threshold;  // 0: no dropout
  float dropout_scale;

  __device__ Sequence(const ChunkedAttentionParams& params, const Line& line, int64_t head_begin,
                      int group_head, const int32_t* group_chunk_numbers, const float* key_scale,
                      int key_scale_stride)
      : line(line),
        head_index(static_cast<uint32_t>(head_begin) + group_head),
        batch(head_index / static_cast<uint32_t>(params.heads)),
        head(head_index - batch * static_cast<uint32_t>(params.heads)),
        key_scale(key_scale),
        key_scale_stride(key_scale_stride),
        causal(params.causal),
        mask_self(params.mask_self),
        drop_zero_keys(params.dtype == DType::f16),
        log2_scale(params.scale * kLog2e) {
    const HeadsView& keys = params.k.data != nullptr ? params.k : params.q;
    q = rows_of(params.q);
    k = rows_of(keys);
    v = rows_of(params.v);
    stride_q = params.q.stride_l;
    stride_k = keys.stride_l;
    stride_v = params.v.stride_l;
    const int64_t slots = line.slots();
    order = params.order != nullptr ? params.order + head_index * slots : nullptr;
    buckets = params.buckets != nullptr ? params.buckets + head_index * slots : nullptr;
    chunk_numbers =
        group_chunk_numbers != nullptr ? group_chunk_numbers + group_head * slots : nullptr;
    padding = params.key_padding_mask != nullptr
                  ? params.key_padding_mask + int64_t{batch} * line.length
                  : nullptr;
    const bool dropout = params.dropout_p > 0;
    dropout_seed = dropout ? static_cast<uint64_t>(*params.dropout_seed) : 0;
    dropout_threshold = dropout ? reformer::dropout_threshold(params.dropout_p) : 0;
    dropout_scale = dropout ? static_cast<float>(1 / (1 - params.dropout_p)) : 1;
  }

  __device__ const T* rows_of(const HeadsView& view) const {
    return static_cast<const T*>(view.data) + batch * view.stride_b + head * view.stride_h;
  }

  __device__ __forceinline__ int token_at(int slot) const {
    return order != nullptr ? min(max(order[slot], 0), line.length - 1) : slot;
  }

  // The key at a slot, for queries of a round. With buckets, keys sorted in another round do not
  // count.
  __device__ __forceinline__ Key key_at(int slot, int round) const {
    const int token = token_at(slot);
    Key key = {token, 1, 0, false};
    if (key_scale != nullptr) key.scale = key_scale[static_cast<int64_t>(token) * key_scale_stride];
    // 1 / eps times a gradient overflows fp16; such a key is 0, and so is all that the scale
    // multiplies.
    if (drop_zero_keys && key.scale >= kMaxKeyScale) key.scale = 0;
    if (buckets != nullptr) {
      key.bucket = buckets[static_cast<int64_t>(round) * line.length + token];
      if (slot / line.length != round) key.token = -1;
    }
    if (padding != nullptr && padding[token]) key.token = -1;
    return key;
  }

  // The query at a slot, for keys of a round.
  __device__ __forceinline__ Query query_at(int slot, int round) const {
    const int own_round = slot / line.length;
    const int token = token_at(slot);
    Query query = {};
    query.token = token;
    query.limit = causal ? token + 1 : line.length;
    query.excluded = mask_self ? token : -1;
    if (buckets != nullptr) {
      query.bucket = buckets[static_cast<int64_t>(round) * line.length + token];
      if (own_round != round) query.limit = 0;
    }
    if (dropout_threshold != 0) {
      query.dropout_key = dropout_row_key(dropout_seed, head_index, own_round, token);
    }
    return query;
  }

  // The rules that do not depend on where the two were sorted to.
  static __device__ __forceinline__ bool allows(const Query& query, const Key& key) {
    return (static_cast<uint32_t>(key.token) < query.limit) & (key.token != query.excluded);
  }

  // The factor of a pair's weight under dropout.
  __device__ __forceinline__ float dropout_factor(const Query& query, const Key& key) const {
    const uint32_t word = dropout_word(query.dropout_key, dropout_key_part(key.token));
    return word >= dropout_threshold ? dropout_scale : 0.0f;
  }

  // In how many slots, over all rounds, the windows of query i hold key j, same buckets only if
  // given.
  __device__ __noinline__ int meetings(int i, int j) const {
    const int rounds = line.rounds, n_chunks = line.n_chunks;
    const int32_t* chunks_i = chunk_numbers + static_cast<int64_t>(i) * rounds;
    const int32_t* chunks_j = chunk_numbers + static_cast<int64_t>(j) * rounds;
    int count = 0;
    for (int round = 0; round < rounds; ++round) {
      const int64_t offset = static_cast<int64_t>(round) * line.length;
      if (buckets != nullptr && buckets[offset + i] != buckets[offset + j]) continue;
      // Chunks are numbered from the first one of this round.
      const int first = chunks_i[round] - line.look_back, last = chunks_i[round] + line.look_ahead;
      count += first <= chunks_j[round] && chunks_j[round] <= last;
      if (!line.wrap) continue;
      const auto meets = [&](int other_round, int begin) {
        other_round %= rounds;
        if (other_round < 0) other_round += rounds;
        if (buckets != nullptr && other_round != round) return false;
        const int chunk = begin + chunks_j[other_round];
        return first <= chunk && chunk <= last;
      };
      for (int other = round - 1, begin = -n_chunks; first < begin + n_chunks;
           --other, begin -= n_chunks) {
        count += meets(other, begin);
      }
      for (int other = round + 1, begin = n_chunks; begin <= last; ++other, begin += n_chunks) {
        count += meets(other, begin);
      }
    }
    return max(count, 1);  // an order that is no permutation could give 0
  }
};

// Calls visit(value, row, column) for the lane's elements of an accumulator: row 0 or 1 is the
// lane's first or second row.
template <int kTiles, class Visit>
__device__ __forceinline__ void for_each(float (&tiles)[kTiles][4], Visit visit) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      visit(tiles[tile][element], element / 2, tile * 8 + member * 2 + element % 2);
    }
  }
}

// Dot products to logits in log2 units, -inf where the pair may not attend. query_of(row, column)
// and key_of(row, column) name the pair; windows are the rows', first_column is where this tile
// begins.
template <int kTiles, typename T, class QueryOf, class KeyOf>
__device__ __forceinline__ void logits_of(float (&scores)[kTiles][4], const Sequence<T>& sequence,
                                          QueryOf query_of, KeyOf key_of, bool windowed,
                                          const Window (&windows)[2], int first_column,
                                          bool careful) {
  const float log2_scale = sequence.log2_scale;
  for_each(scores, [&](float& score, int row, int column) {
    const Key& key = key_of(row, column);
    score *= key.scale * log2_scale;
    score = sequence.allows(query_of(row, column), key) ? score : -INFINITY;
  });
  if (windowed) {
    const int slots = sequence.line.slots();
    for_each(scores, [&](float& score, int row, int column) {
      score = windows[row].holds(first_column + column, slots) ? score : -INFINITY;
    });
  }
  if (sequence.buckets != nullptr) {
    for_each(scores, [&](float& score, int row, int column) {
      score = query_of(row, column).bucket == key_of(row, column).bucket ? score : -INFINITY;
    });
  }
  if (sequence.chunk_numbers != nullptr) {
    // Rolled, with the tile picked by comparison: calls in unrolled code would cost too many
    // registers.
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      float corrections[1][4];
      for_each(corrections, [&](float& correction, int row, int column) {
        const Query& query = query_of(row, tile * 8 + column);
        const Key& key = key_of(row, tile * 8 + column);
        const bool allowed = sequence.allows(query, key);
        correction =
            allowed ? log2f(static_cast<float>(sequence.meetings(query.token, key.token))) : 0;
      });
#pragma unroll
      for (int other = 0; other < kTiles; ++other) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          scores[other][element] -= other == tile ? corrections[0][element] : 0.0f;
        }
      }
    }
  }
  if (careful) {
    for_each(scores, [&](float& score, int row, int column) {
      const Query& query = query_of(row, column);
      const bool non_finite = query.non_finite || key_of(row, column).non_finite;
      if (score != -INFINITY && non_finite && query.lse != INFINITY) score = NAN;
    });
  }
}

// 0 * NaN is NaN: in a product of tiles one row with a NaN spoils rows that must not see it. A
// block that ends with something non-finite therefore starts again with care: such rows of a
// streamed tile become zeros and are marked, and the logits of the pairs that do see them become
// NaN.
template <typename T, int kColumns, int kHeadDim, int kStride, int kThreads, typename Column>
__device__ void isolate_non_finite(T* tile, Column* columns) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kColumns; row += kThreads / 32) {
    T* values = tile + row * kStride;
    bool non_finite = false;
    for (int i = lane; i < kHeadDim; i += 32) non_finite |= !isfinite(to_float(values[i]));
    if (!__any_sync(0xffffffffU, non_finite)) continue;
    for (int i = lane; i < kHeadDim; i += 32) values[i] = from_float<T>(0);
    if (lane == 0) columns[row].non_finite = true;
  }
}

template <int kTiles>
__device__ __forceinline__ bool any_non_finite(const float (&sum)[kTiles][4]) {
  bool found = false;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int element = 0; element < 4; ++element) found |= !(fabsf(sum[tile][element]) <= FLT_MAX);
  }
  return found;
}

// Starts copying kRows rows of [L, head_dim], those at token_of(row), into a tile; zeros for token
// -1 and beyond head_dim.
template <typename T, int kRows, int kHeadDim, int kStride, int kThreads, class TokenOf>
__device__ __forceinline__ void gather_rows(T* tile, const T* rows, int64_t stride, int head_dim,
                                            TokenOf token_of) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = kHeadDim / kPiece;
  static_assert(kRows * kPieces % kThreads == 0);
#pragma unroll 4
  for (int first = 0; first < kRows * kPieces; first += kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    const int row = index / kPieces, column = index % kPieces * kPiece;
    const int token = token_of(row);
    const bool valid = token >= 0 && column < head_dim;
    copy_async_or_zero(shared_address(tile + row * kStride + column),
                       valid ? rows + token * stride + column : rows, valid);
  }
}

// Writes a warp's 16 rows to target [L, head_dim] at tokens[row] (none for -1), columns from
// first_column on, through 16 rows of shared memory that are the warp's own, so that a row goes out
// in 16-byte pieces.
template <typename T, int kTiles>
__device__ __forceinline__ void scatter_rows(const float (&sum)[kTiles][4], T* slab, int stride,
                                             T* target, int head_dim, int first_column,
                                             const int* tokens) {
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  constexpr int kPiece = 16 / sizeof(T), kPieces = kTiles * 8 / kPiece;
  __syncwarp();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* pair = slab + (group + 8 * half) * stride + tile * 8 + member * 2;
      const float low = sum[tile][2 * half], high = sum[tile][2 * half + 1];
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(pair) = pack_pair(low, high, T{});
      } else {
        *reinterpret_cast<float2*>(pair) = make_float2(low, high);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int first = 0; first < 16 * kPieces; first += 32) {
    const int index = first + lane;
    const int row = index / kPieces, column = index % kPieces * kPiece;
    const int token = tokens[row];
    if (token < 0 || first_column + column >= head_dim) continue;
    const uint4 piece = *reinterpret_cast<const uint4*>(slab + row * stride + column);
    *reinterpret_cast<uint4*>(target + static_cast<int64_t>(token) * head_dim + first_column +
                              column) = piece;
  }
  __syncwarp();
}

// Calls launch(T{}, std::integral_constant<int, kHeadDim>) for the element type and the head
// dimension rounded up to what there is a kernel for.
template <class Launch>
cudaError_t dispatch(const ChunkedAttentionParams& params, Launch launch) {
  return dispatch_dtype(params.dtype, [&](auto element) {
    if (params.head_dim <= 32) return launch(element, std::integral_constant<int, 32>{});
    if (params.head_dim <= 64) return launch(element, std::integral_constant<int, 64>{});
    if (params.head_dim <= 128) return launch(element, std::integral_constant<int, 128>{});
    if (params.head_dim <= 256) return launch(element, std::integral_constant<int, 256>{});
    return cudaErrorInvalidValue;
  });
}

// Launches with the dynamic shared memory that the kernel's Shared struct takes.
template <typename... Arguments, typename... Values>
cudaError_t launch_kernel(void (*kernel)(Arguments...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t stream, const Values&... values) {
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, shared_bytes, stream>>>(values...);
  return cudaGetLastError();
}

}  // namespace reformer::kernels::generic

// Which pairs of chunked attention with shared QK may attend, and which weights dropout keeps,
// where more than positions decides: as bits in the places of the main kernels' scores. A kernel of
// its own, as it keeps many more threads in flight than those.
#include "chunked_attention_sm90.cuh"
#include "dropout.h"

namespace reformer::kernels {
namespace {

using namespace sm90;

static_assert(kPairThreads == kThreads);

struct PairBitsArgs {
  const int32_t* order;          // [B * H, R, L], or null: one round in natural order
  const int32_t* buckets;        // [B * H, R, L]; null: they do not matter
  const int32_t* chunk_numbers;  // [head_count, L, R]; null: pairs may meet again
  const bool* key_padding_mask;  // [B, L], or null
  const int64_t* dropout_seed;
  uint32_t dropout_threshold;
  Line line;
  int heads, head_begin;
  bool causal;
  void* bits;
};

constexpr int kRoundBatch = 8;

// What is known of a chunk's rows.
struct ChunkRows {
  int key[kTileRows], query[kTileRows];  // for may_attend
  int bucket[kTileRows];
  uint32_t key_part[kTileRows], query_part[kTileRows];  // for is_dropped
  int chunk_numbers[1 + kRoundBatch][kTileRows];        // from the round before the batch on
};

// The scores' rows and columns of one thread: its rows are upper_row and upper_row + 8, its columns
// of group j are quad_column(j) and the one after.
struct Place {
  uint32_t upper_row, quad_column;
  __device__ explicit Place(uint32_t thread)
      : upper_row(thread / 32 * 16 + thread % 32 / 4), quad_column(thread % 4 * 2) {}
};

// Sets the bits of the pairs for which test(of_row, of_column) holds.
template <typename T, typename Test>
__device__ __forceinline__ void set_bits(uint32_t& bits, const T* of_rows, const T* of_columns,
                                         const Place& place, Test test) {
  const T rows[2] = {of_rows[place.upper_row], of_rows[place.upper_row + 8]};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const T column = of_columns[8 * j + place.quad_column + e % 2];
      if (test(rows[e / 2], column)) bits |= 1U << (4 * j + e);
    }
  }
}

template <bool kKeysInRows>
__global__ void __launch_bounds__(kPairThreads)
    pair_bits_kernel(const __grid_constant__ PairBitsArgs args) {
  wait_for_previous_kernel();
  __shared__ ChunkRows rows_of[2];  // by PairTile: of the keys; the queries are the own chunk's
  const Line& line = args.line;
  const int local_head = blockIdx.y, head = args.head_begin + local_head;
  const Chunk own = line.at(static_cast<int>(blockIdx.x));
  const Chunk previous = line.at(static_cast<int>(blockIdx.x) - 1);
  const int64_t head_begin = int64_t{head} * line.rounds * line.length;

  // One row each.
  const uint32_t tile = threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
  const Chunk chunk = tile == kOwnKeys ? own : previous;
  ChunkRows& rows = rows_of[tile];
  const int32_t* order = args.order == nullptr ? nullptr : args.order + head_begin;
  const int slot = chunk.index * kTileRows + static_cast<int>(row);
  const int token = position_at(line, order, chunk.round, slot);
  const int32_t* chunk_numbers =
      args.chunk_numbers == nullptr
          ? nullptr
          : args.chunk_numbers + (int64_t{local_head} * line.length + token) * line.rounds;
  bool is_key = slot < line.length && (tile == kOwnKeys || line.has_previous(own)) &&
                !(args.key_padding_mask != nullptr &&
                  args.key_padding_mask[int64_t{head / args.heads} * line.length + token]);
  // A round's first chunk, after wrapping, sees keys of another round, of which some are its own.
  if (chunk_numbers != nullptr && tile == kPreviousKeys && own.index == 0) {
    is_key = is_key && chunk_numbers[own.round] != 0;
  }
  rows.key[row] = is_key ? token : kInvalidKey;
  rows.query[row] = args.causal ? query_bound<true>(line, token) : query_bound<false>(line, token);
  if (args.buckets != nullptr) {
    rows.bucket[row] = args.buckets[head_begin + int64_t{own.round} * line.length + token];
  }
  if (args.dropout_seed != nullptr) {
    const uint32_t head_key =
        dropout_head_key(static_cast<uint64_t>(*args.dropout_seed), static_cast<uint32_t>(head));
    const uint32_t round_key = dropout_round_key(head_key, static_cast<uint32_t>(own.round));
    rows.query_part[row] =
        dropout_query_part(dropout_row_key(round_key, static_cast<uint32_t>(token)));
    rows.key_part[row] = dropout_key_part(static_cast<uint32_t>(token));
  }
  __syncthreads();

  const Place place(threadIdx.x);
  const ChunkRows& queries = rows_of[kOwnKeys];
  const auto set = [&](uint32_t& bits, const auto* of_keys, const auto* of_queries, auto test) {
    if constexpr (kKeysInRows) {
      set_bits(bits, of_keys, of_queries, place, test);
    } else {
      set_bits(bits, of_queries, of_keys, place,
               [&](auto query, auto key) { return test(key, query); });
    }
  };
  PairBits bits[2] = {};
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const ChunkRows& keys = rows_of[tile];
    if (args.causal) {
      set(bits[tile].blocked, keys.key, queries.query,
          [](int key, int query) { return !may_attend<true>(key, query); });
    } else {
      set(bits[tile].blocked, keys.key, queries.query,
          [](int key, int query) { return !may_attend<false>(key, query); });
    }
    if (args.buckets != nullptr) {
      set(bits[tile].blocked, keys.bucket, queries.bucket,
          [](int key, int query) { return key != query; });
    }
    if (args.dropout_seed != nullptr) {
      set(bits[tile].dropped, keys.key_part, queries.query_part, [&](uint32_t key, uint32_t query) {
        return is_dropped(query, key, args.dropout_threshold);
      });
    }
  }

  // A pair that met in an earlier round has counted there.
  const int earlier_rounds = chunk_numbers == nullptr ? 0 : own.round;
  for (int begin = 0; begin < earlier_rounds; begin += kRoundBatch) {
    const int count = min(kRoundBatch, earlier_rounds - begin);
    bool in_first_chunk = false;  // its keys may be of another round
    for (int i = 0; i <= count; ++i) {
      const int round = begin + i - 1;
      const int number = chunk_numbers[round < 0 ? line.rounds - 1 : round];
      rows.chunk_numbers[i][row] = number;
      in_first_chunk = in_first_chunk || (i > 0 && number == 0);
    }
    const bool wraps = __syncthreads_or(line.wrap && tile == kOwnKeys && in_first_chunk) != 0;
#pragma unroll 1
    for (int i = 1; i <= count; ++i) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const auto& keys = rows_of[tile].chunk_numbers;
        set(bits[tile].blocked, keys[i], queries.chunk_numbers[i],
            [](int key, int query) { return static_cast<uint32_t>(query - key) <= 1; });
        if (wraps) {
          set(bits[tile].blocked, keys[i - 1], queries.chunk_numbers[i],
              [&](int key, int query) { return query == 0 && key == line.chunks_per_round - 1; });
        }
      }
    }
    __syncthreads();
  }

  const int64_t first = (int64_t{local_head} * line.chunks() + blockIdx.x) * 2;
  for (int tile = 0; tile < 2; ++tile) {
    const int64_t index = (first + tile) * kPairThreads + threadIdx.x;
    if (args.dropout_seed != nullptr) {
      static_cast<uint2*>(args.bits)[index] = {bits[tile].blocked, bits[tile].dropped};
    } else {
      static_cast<uint32_t*>(args.bits)[index] = bits[tile].blocked;
    }
  }
}

}  // namespace

int64_t pair_bits_size(const ChunkedAttentionParams& params, int64_t head_count) {
  const int64_t word = params.dropout_p > 0 ? sizeof(PairBits) : sizeof(uint32_t);
  return head_count * make_line(params).chunks() * 2 * kPairThreads * word;
}

cudaError_t make_pair_bits(const ChunkedAttentionParams& params, int64_t head_begin,
                           int64_t head_count, const int32_t* chunk_numbers, bool keys_in_rows,
                           void* pair_bits, cudaStream_t stream) {
  const Line line = make_line(params);
  const PairBitsArgs args{params.order,
                          params.buckets,
                          chunk_numbers,
                          params.key_padding_mask,
                          params.dropout_seed,
                          reformer::dropout_threshold(params.dropout_p),
                          line,
                          static_cast<int>(params.heads),
                          static_cast<int>(head_begin),
                          params.causal,
                          pair_bits};
  const dim3 grid(line.chunks(), static_cast<unsigned>(head_count));
  return launch_overlapped(keys_in_rows ? pair_bits_kernel<true> : pair_bits_kernel<false>,
                           {grid, kPairThreads}, stream, args);
}

}  // namespace reformer::kernels

// Which pairs of chunked attention with shared QK may attend, and which weights dropout keeps,
// where more than positions decides: as bits in the places of the main kernels' scores. A kernel of
// its own, as it keeps many more threads in flight than those. Integer units bound it, which do
// half of what the others can: what can be is done in floating point.
#include "chunked_attention_tiled.cuh"
#include "dropout.h"

namespace reformer::kernels {
namespace {

using namespace tiled;

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
  uint32_t key_part[kTileRows], row_key[kTileRows];  // for dropout_word
  float chunk_number[1 + kRoundBatch][kTileRows];    // from the round before the batch on
};

// A pair of the thread's part of a tile's scores: element [j][e] of the accumulator.
template <bool kKeysInRows>
struct Pair {
  int key, query;  // rows of the chunks
  __device__ __forceinline__ Pair(uint32_t thread, int j, int e) {
    const auto row = static_cast<int>(thread / 32 * 16 + thread % 32 / 4 + 8 * (e / 2));
    const auto column = static_cast<int>(8 * j + thread % 4 * 2 + e % 2);
    key = kKeysInRows ? row : column;
    query = kKeysInRows ? column : row;
  }
};

// Bits set one by one, as sums of powers of two in the mantissas of 2^23 and more.
class Bits {
 public:
  __device__ __forceinline__ void set(int i) { halves_[i / 16] += static_cast<float>(1 << i % 16); }
  __device__ __forceinline__ uint32_t word() const {
    return __byte_perm(__float_as_uint(halves_[0]), __float_as_uint(halves_[1]), 0x5410);
  }

 private:
  float halves_[2] = {1 << 23, 1 << 23};
};

// The bits of the pairs for which test(pair, 4 j + e) holds.
template <bool kKeysInRows, typename Test>
__device__ __forceinline__ uint32_t collect(uint32_t thread, Test test) {
  Bits bits;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (test(Pair<kKeysInRows>(thread, i / 4, i % 4), i)) bits.set(i);
  }
  return bits.word();
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
  const int token = position_of(line, order_at(line, order, chunk.round, slot));
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
    rows.row_key[row] = dropout_row_key(round_key, static_cast<uint32_t>(token));
    rows.key_part[row] = dropout_key_part(static_cast<uint32_t>(token));
  }
  __syncthreads();

  const ChunkRows& queries = rows_of[kOwnKeys];
  PairBits bits[2] = {};
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const ChunkRows& keys = rows_of[tile];
    const auto blocked = [&](auto causal, auto by_bucket) {
      return collect<kKeysInRows>(threadIdx.x, [&](auto pair, int) {
        bool block = !may_attend<causal()>(keys.key[pair.key], queries.query[pair.query]);
        if constexpr (by_bucket()) block |= keys.bucket[pair.key] != queries.bucket[pair.query];
        return block;
      });
    };
    const std::true_type yes;
    const std::false_type no;
    if (args.buckets != nullptr) {
      bits[tile].blocked = args.causal ? blocked(yes, yes) : blocked(no, yes);
    } else {
      bits[tile].blocked = args.causal ? blocked(yes, no) : blocked(no, no);
    }
    if (args.dropout_seed != nullptr) {
      bits[tile].dropped = collect<kKeysInRows>(threadIdx.x, [&](auto pair, int) {
        return dropout_word(queries.row_key[pair.query], keys.key_part[pair.key]) <
               args.dropout_threshold;
      });
    }
  }

  // A pair that met in an earlier round has counted there.
  const int earlier_rounds = chunk_numbers == nullptr ? 0 : own.round;
  for (int begin = 0; begin < earlier_rounds; begin += kRoundBatch) {
    const int count = min(kRoundBatch, earlier_rounds - begin);
    bool in_first_chunk = false;
    for (int i = 0; i <= count; ++i) {
      const int round = begin + i - 1;
      const int number = chunk_numbers[round < 0 ? line.rounds - 1 : round];
      rows.chunk_number[i][row] = static_cast<float>(number);
      in_first_chunk = in_first_chunk || (i > 0 && number == 0);
    }
    // Whether queries were in a first chunk, which saw keys of the round before.
    const bool wraps = __syncthreads_or(line.wrap && tile == kOwnKeys && in_first_chunk) != 0;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const auto& of_keys = rows_of[tile].chunk_number;
      const auto& of_queries = queries.chunk_number;
      float apart[32];  // 0 for pairs that met
#pragma unroll
      for (float& x : apart) x = 1;
#pragma unroll 1
      for (int i = 1; i <= count; ++i) {
#pragma unroll
        for (int bit = 0; bit < 32; ++bit) {
          const Pair<kKeysInRows> pair(threadIdx.x, bit / 4, bit % 4);
          const float behind = of_queries[i][pair.query] - of_keys[i][pair.key];
          apart[bit] *= __saturatef(behind * behind - behind);  // 0 where behind is 0 or 1
        }
        if (!wraps) continue;
#pragma unroll
        for (int bit = 0; bit < 32; ++bit) {
          const Pair<kKeysInRows> pair(threadIdx.x, bit / 4, bit % 4);
          const bool met =
              of_queries[i][pair.query] == 0.0F &&
              of_keys[i - 1][pair.key] == static_cast<float>(line.chunks_per_round - 1);
          if (met) apart[bit] = 0;
        }
      }
      bits[tile].blocked |=
          collect<kKeysInRows>(threadIdx.x, [&](auto, int bit) { return apart[bit] == 0.0F; });
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

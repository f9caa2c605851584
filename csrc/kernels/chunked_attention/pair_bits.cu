// Which pairs of chunked attention with shared QK may attend, and which weights dropout keeps,
// where more than positions decides: as bits in the places of the main kernels' scores. A kernel of
// its own, as it keeps many more threads in flight than those. Integer units bound it, which do
// half of what the others can: what can be is done in floating point.
#include "chunked_attention/tiled/tiled.cuh"
#include "common/dropout.h"

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
  int run_length = 0;
};

constexpr int kLongestRun = 32;
constexpr int kLongestUnevenRun = 4;  // where later rounds take longer
constexpr int kRoundBatch = 8;

// What is known of a chunk's rows.
struct ChunkRows {
  int token[kTileRows];
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

// Blocks the pairs that met in an earlier round and have counted there.
template <bool kKeysInRows>
__device__ __forceinline__ void block_repeated(PairBits (&bits)[2], const PairBitsArgs& args,
                                               Chunk own, ChunkRows& queries,
                                               ChunkRows& previous_keys) {
  const Line& line = args.line;
  const uint32_t tile = threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
  ChunkRows& rows = tile == kOwnKeys ? queries : previous_keys;
  const int32_t* chunk_numbers =
      args.chunk_numbers + (int64_t{blockIdx.y} * line.length + rows.token[row]) * line.rounds;
  for (int begin = 0; begin < own.round; begin += kRoundBatch) {
    const int count = min(kRoundBatch, own.round - begin);
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
      const auto& of_keys = (tile == kOwnKeys ? queries : previous_keys).chunk_number;
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
}

// What is loaded of a row, ahead of its use.
struct LoadedRow {
  int token, bucket = 0;
  bool is_inside;  // not past the end, nor padding
};

template <bool kKeysInRows, bool kCorrectsDuplicates>
__global__ void __launch_bounds__(kPairThreads)
    pair_bits_kernel(const __grid_constant__ PairBitsArgs args) {
  wait_for_previous_kernel();
  __shared__ ChunkRows ring[kSlots];
  const Line& line = args.line;
  const int first_chunk = blockIdx.x * args.run_length;
  const int steps = min(args.run_length, line.chunks() - first_chunk);
  const int local_head = blockIdx.y, head = args.head_begin + local_head;
  const int64_t head_begin = int64_t{head} * line.rounds * line.length;
  const int32_t* order = args.order == nullptr ? nullptr : args.order + head_begin;
  const bool* padding = args.key_padding_mask == nullptr
                            ? nullptr
                            : args.key_padding_mask + int64_t{head / args.heads} * line.length;
  const uint32_t head_key = args.dropout_seed == nullptr
                                ? 0
                                : dropout_head_key(static_cast<uint64_t>(*args.dropout_seed),
                                                   static_cast<uint32_t>(head));

  // Chunks are numbered from the run's predecessor on. While the pairs of chunk n are worked out,
  // the rows of chunk n + 1 are prepared, what their tokens tell of those of chunk n + 2 is loaded,
  // and the entries of chunk n + 3. A row each, by half of the threads.
  const uint32_t row = threadIdx.x % kTileRows;
  const bool has_row = threadIdx.x < kTileRows;
  const auto slot_of = [&](Chunk chunk) { return chunk.index * kTileRows + static_cast<int>(row); };
  const auto load_entry = [&](Chunk chunk) {
    return order_at(line, order, chunk.round, slot_of(chunk));
  };
  const auto load_row = [&](Chunk chunk, uint32_t entry) {
    LoadedRow loaded{position_of(line, entry)};
    if (args.buckets != nullptr) {
      loaded.bucket = args.buckets[head_begin + int64_t{chunk.round} * line.length + loaded.token];
    }
    loaded.is_inside =
        slot_of(chunk) < line.length && !(padding != nullptr && padding[loaded.token]);
    return loaded;
  };
  const auto prepare_row = [&](ChunkRows& rows, Chunk chunk, const LoadedRow& loaded) {
    const int token = loaded.token;
    rows.token[row] = token;
    rows.key[row] = loaded.is_inside ? token : kInvalidKey;
    rows.query[row] =
        args.causal ? query_bound<true>(line, token) : query_bound<false>(line, token);
    rows.bucket[row] = loaded.bucket;
    if (args.dropout_seed != nullptr) {
      const uint32_t round_key = dropout_round_key(head_key, static_cast<uint32_t>(chunk.round));
      rows.row_key[row] = dropout_row_key(round_key, static_cast<uint32_t>(token));
      rows.key_part[row] = dropout_key_part(static_cast<uint32_t>(token));
    }
  };

  Chunk own = line.at(first_chunk), next = line.next(own), ahead = line.next(next);
  LoadedRow loaded{};
  uint32_t entry = 0;
  if (has_row) {
    const Chunk previous = line.at(first_chunk - 1);
    prepare_row(ring[0], previous, load_row(previous, load_entry(previous)));
    prepare_row(ring[1], own, load_row(own, load_entry(own)));
    loaded = load_row(next, load_entry(next));
    entry = load_entry(ahead);
  }
  for (int n = 1; n <= steps; ++n) {
    __syncthreads();
    ChunkRows& queries = ring[n % kSlots];
    ChunkRows& previous_keys = ring[(n - 1) % kSlots];
    if (has_row && n < steps) {
      prepare_row(ring[(n + 1) % kSlots], next, loaded);
      loaded = load_row(ahead, entry);
      entry = load_entry(line.next(ahead));
    }
    // A round's first chunk, after wrapping, sees keys of another round, of which some are its own.
    if (kCorrectsDuplicates && own.index == 0) {
      const int64_t rows_before = int64_t{local_head} * line.length;
      if (has_row &&
          args.chunk_numbers[(rows_before + previous_keys.token[row]) * line.rounds + own.round] ==
              0) {
        previous_keys.key[row] = kInvalidKey;
      }
      __syncthreads();
    }

    PairBits bits[2] = {};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const ChunkRows& keys = tile == kOwnKeys ? queries : previous_keys;
      const auto blocked = [&](auto causal, auto by_bucket) {
        return collect<kKeysInRows>(threadIdx.x, [&](auto pair, int) {
          bool block = !may_attend<causal()>(keys.key[pair.key], queries.query[pair.query]);
          if constexpr (by_bucket()) block |= keys.bucket[pair.key] != queries.bucket[pair.query];
          return block;
        });
      };
      const std::true_type yes;
      const std::false_type no;
      if (tile == kPreviousKeys && !line.has_previous(own)) {
        bits[tile].blocked = ~0U;
      } else if (args.buckets != nullptr) {
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
    if constexpr (kCorrectsDuplicates) {
      block_repeated<kKeysInRows>(bits, args, own, queries, previous_keys);
    }

    const int64_t first =
        (int64_t{local_head} * line.chunks() + first_chunk + n - 1) * 2 * kPairThreads;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t index = first + tile * kPairThreads + threadIdx.x;
      if (args.dropout_seed != nullptr) {
        static_cast<uint2*>(args.bits)[index] = {bits[tile].blocked, bits[tile].dropped};
      } else {
        static_cast<uint32_t*>(args.bits)[index] = bits[tile].blocked;
      }
    }
    own = next, next = ahead, ahead = line.next(ahead);
  }
}

}  // namespace

cudaError_t make_pair_bits(const ChunkedAttentionParams& params, int64_t head_begin,
                           int64_t head_count, const int32_t* chunk_numbers, bool keys_in_rows,
                           void* pair_bits, cudaStream_t stream) {
  const PairBitsArgs args{params.order,
                          params.buckets,
                          chunk_numbers,
                          params.key_padding_mask,
                          params.dropout_seed,
                          reformer::dropout_threshold(params.dropout_p),
                          make_line(params),
                          static_cast<int>(params.heads),
                          static_cast<int>(head_begin),
                          params.causal,
                          pair_bits};
  const auto launch = [&](auto kernel, int longest_run) {
    return launch_pass(kernel, args, head_count, kPairThreads, 0, 0, longest_run, stream);
  };
  if (chunk_numbers != nullptr) {
    return launch(keys_in_rows ? pair_bits_kernel<true, true> : pair_bits_kernel<false, true>,
                  kLongestUnevenRun);
  }
  return launch(keys_in_rows ? pair_bits_kernel<true, false> : pair_bits_kernel<false, false>,
                kLongestRun);
}

}  // namespace reformer::kernels

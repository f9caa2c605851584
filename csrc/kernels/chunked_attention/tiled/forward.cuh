// Forward main kernel of chunked attention: shared QK, chunks of 64, one chunk back. For either
// unit of tensor cores: Wgmma or MmaSync.
//
// Per chunk: S = Q K^T for the chunk's own and the previous chunk's keys, both in registers;
// O = P V with P kept in registers, normalised within the window; rows scattered to the round's
// partial. The diagonal of a chunk's own scores is |q|^2, which makes its keys q / |q|.
#pragma once

#include "chunked_attention/tiled/masks.cuh"

namespace reformer::kernels::tiled {

template <typename Element>
struct ForwardArgs {
  Rows q, v;
  const int32_t* order;
  const bool* key_padding_mask;
  Element* partial_out;
  float* partial_lse;
  Line line;
  int heads, head_begin, run_length = 0;
  float scale_log2;  // scale * log2(e)
  MaskArgs masks;

  ForwardArgs(const ChunkedAttentionParams& params, const ForwardStage& stage)
      : q(params.q, sizeof(Element)),
        v(params.v, sizeof(Element)),
        order(params.order),
        key_padding_mask(params.key_padding_mask),
        partial_out(static_cast<Element*>(stage.partial_out)),
        partial_lse(stage.partial_lse),
        line(make_line(params)),
        heads(static_cast<int>(params.heads)),
        head_begin(static_cast<int>(stage.head_begin)),
        scale_log2(params.scale * kLog2E),
        masks(params, stage.pair_bits) {}
};

// Where products are done at once, the next chunk takes the place of the previous one as soon as
// there are scores: less shared memory, for multiprocessors that have little.
template <typename Unit>
constexpr int kQuerySlots = Unit::kOperandsInRegisters ? 2 : kSlots;

// Shared memory: a ring of chunks, each the tiles of q (queries and keys) and those of v, and their
// constants.
template <typename Unit, int kHeadDim>
struct ForwardShared {
  uint8_t q[kQuerySlots<Unit>][kTilesPerRow<kHeadDim>][kTileBytes];
  uint8_t v[kSlots][kTilesPerRow<kHeadDim>][kTileBytes];
  float key_scale[kSlots][kTileRows];   // scale * log2(e) / |q|
  int key_position[kSlots][kTileRows];  // kInvalidKey: nobody may attend to it
  int no_positions[kTileRows];          // key positions of a chunk that has no predecessor
  int position[kPositionSlots][kTileRows];
  uint8_t staging[kWarps][kStagingBytes];
};

// The lse of neighbouring positions come from chunks far apart: in rounds longer than this their
// cache lines are kept for one another.
inline constexpr int kLongestStreamedRound = 1 << 18;

// Logits in base 2 are at most |q| scale log2(e), as keys have unit length. Where that bound is no
// larger than this, the softmax is shifted by it and no maximum is taken: the largest weight of a
// row is at least 2^(-2 bound), where Element still has its precision.
template <typename Element>
__device__ constexpr float largest_bound() {
  return std::is_same_v<Element, __half> ? 4.0F : 40.0F;
}

// Folds the logits of a key tile in base 2 into the maxima of the thread's two rows.
template <bool kCausal, int kMasks>
__device__ __forceinline__ void fold_maxima(float (&maxima)[2], const Accumulator& scores,
                                            const float* key_scale, const int* key_position,
                                            const Pairs<true, kCausal, kMasks>& pairs,
                                            uint32_t thread) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t column = 8 * j + thread % 4 * 2;
    const float2 pair = *reinterpret_cast<const float2*>(&key_scale[column]);
    const float scales[2] = {pair.x, pair.y};
    const int2 positions = *reinterpret_cast<const int2*>(&key_position[column]);
    const auto columns = pairs.columns(j, {positions.x, positions.y});
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float logit = columns.attend(e) ? scores[j][e] * scales[e % 2] : -INFINITY;
      maxima[e / 2] = fmaxf(maxima[e / 2], logit);
    }
  }
}

// P = exp2(logit - shift) as A operand, 0 where the query may not attend; adds the thread's weights
// to its rows' sums. Dropout is for the operand alone.
template <typename Element, bool kCausal, int kMasks>
__device__ __forceinline__ void exponentiate(Fragments& weights, float (&sums)[2],
                                             const Accumulator& scores, const float (&shifts)[2],
                                             const float* key_scale, const int* key_position,
                                             const Pairs<true, kCausal, kMasks>& pairs,
                                             uint32_t thread) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t column = 8 * j + thread % 4 * 2;
    const float2 pair = *reinterpret_cast<const float2*>(&key_scale[column]);
    const float scales[2] = {pair.x, pair.y};
    const int2 positions = *reinterpret_cast<const int2*>(&key_position[column]);
    const auto columns = pairs.columns(j, {positions.x, positions.y});
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool valid = columns.attend(e);
      const float weight = exp2_approx(fmaf(scores[j][e], scales[e % 2], -shifts[e / 2]));
      p[e] = valid ? weight : 0.0F;
      sums[e / 2] += p[e];
      if constexpr (kMasks == kDropped) p[e] = columns.drop(e) ? 0.0F : p[e];
    }
    pack_columns<Element>(weights, j, p[0], p[1], p[2], p[3]);
  }
}

// |q|^2 of the thread's two rows, from the scores of a chunk with itself; every lane of a quad gets
// both.
[[maybe_unused]] __device__ __forceinline__ void read_diagonal(float (&squares)[2],
                                                               const Accumulator& scores,
                                                               uint32_t thread) {
  const uint32_t warp = thread / 32, row = thread % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float square = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* pair = &scores[2 * w + half][2 * half];
      if (warp == w) square = row % 2 == 0 ? pair[0] : pair[1];
    }
    squares[half] = __shfl_sync(0xffffffff, square, thread % 32 / 4 * 4 + row / 2);
  }
}

// |q|^2 of a row of a chunk, by two neighbouring threads: what read_diagonal cannot give of the
// chunk before a run.
template <typename Element, int kHeadDim>
__device__ __forceinline__ float row_square(const uint8_t* tile, uint32_t thread) {
  constexpr uint32_t kPieces = kHeadDim / 16;  // of 16 bytes, of a thread
  float square = 0.0F;
#pragma unroll
  for (uint32_t i = 0; i < kPieces; ++i) {
    const uint32_t piece = thread % 2 * kPieces + i;
    const uint4 words = *reinterpret_cast<const uint4*>(tile + piece / 8 * kTileBytes +
                                                        swizzled(thread / 2, piece % 8));
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
      const float2 pair = unpack<Element>(word);
      square = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, square));
    }
  }
  return square + __shfl_xor_sync(0xffffffff, square, 1);
}

// 1 / |q|, at most kMaxKeyScale; NaN stays NaN.
[[maybe_unused]] __device__ __forceinline__ float inverse_norm(float square) {
  constexpr float kLeast = kMinKeyNorm * kMinKeyNorm;
  return rsqrt_approx(square < kLeast ? kLeast : square);
}

// The body of the kernel.
template <typename Unit, int kHeadDim, bool kCausal, int kMasks>
__device__ __forceinline__ void attend_forward(const ForwardArgs<typename Unit::Element>& args) {
  using Element = typename Unit::Element;
  wait_for_previous_kernel();
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Unit, kHeadDim>*>(shared_bytes);
  const Line& line = args.line;
  constexpr int kParts = kTilesPerRow<kHeadDim>;
  // Few of them: what can be computed again does not live through the loop.
  constexpr bool kFewRegisters = Unit::kOperandsInRegisters;
  constexpr bool kLateEntries = kFewRegisters || kMasks != kPlain;
  // A late entry has had no time to come by the start of the next chunk.
  constexpr bool kLateStore = kLateEntries && !kFewRegisters;

  const int first_chunk = blockIdx.x * args.run_length;
  const uint32_t steps = min(args.run_length, line.chunks() - first_chunk);
  const int local_head = blockIdx.y, head = args.head_begin + local_head, batch = head / args.heads;
  const int64_t rows_per_head = int64_t{line.rounds} * line.length;

  const int32_t* order =
      args.order == nullptr ? nullptr : args.order + int64_t{head} * rows_per_head;
  const bool* padding = args.key_padding_mask == nullptr
                            ? nullptr
                            : args.key_padding_mask + int64_t{batch} * line.length;
  const uint8_t* q = args.q.head(batch, head % args.heads);
  const uint8_t* v = args.v.head(batch, head % args.heads);
  Element* partial_out = args.partial_out + local_head * rows_per_head * kHeadDim;
  float* partial_lse = args.partial_lse + local_head * rows_per_head;

  // Chunks are numbered from the run's predecessor on. While chunk n attends, chunk n + 1 is
  // copied, the positions of chunk n + 2 are in shared memory and those of chunk n + 3 on their
  // way.
  Chunk chunk = line.at(first_chunk), ahead = line.at(first_chunk - 1);
  const auto load_entry = [&] {
    const int slot = ahead.index * kTileRows + threadIdx.x;
    const int32_t* orders = order;
    if constexpr (kFewRegisters) {
      const int64_t rows_before = (args.head_begin + renewed(blockIdx.y)) * rows_per_head;
      orders = args.order == nullptr ? nullptr : args.order + rows_before;
    }
    return threadIdx.x < kTileRows ? order_at(line, orders, ahead.round, slot) : 0;
  };
  const auto gather = [&](uint32_t n, uint32_t rows, uint32_t thread) {
    const uint32_t slot = n % kSlots;
    const auto& positions = shared.position[n % kPositionSlots];
    typename Copy<kHeadDim>::Positions copied;
    read_copied_positions<kHeadDim>(copied, positions, thread);
    const uint8_t *q_rows = q, *v_rows = v;
    if constexpr (Unit::kOperandsInRegisters) {
      const int sequence = args.head_begin + renewed(blockIdx.y);
      q_rows = args.q.head(sequence / args.heads, sequence % args.heads);
      v_rows = args.v.head(sequence / args.heads, sequence % args.heads);
    }
    gather_tile<kHeadDim>(shared_address(shared.q[n % kQuerySlots<Unit>]), q_rows, args.q.row_bytes,
                          copied, thread);
    gather_tile<kHeadDim>(shared_address(shared.v[slot]), v_rows, args.v.row_bytes, copied, thread);
    if (thread < kTileRows) {
      const int position = positions[thread];
      const bool valid = thread < rows && !(padding != nullptr && padding[position]);
      shared.key_position[slot][thread] = valid ? position : kInvalidKey;
    }
    copy_async_commit();
  };

  const auto store_position = [&](uint32_t n, uint32_t entry) {
    if (threadIdx.x < kTileRows)
      shared.position[n % kPositionSlots][threadIdx.x] = position_of(line, entry);
  };
  if (threadIdx.x < kTileRows) shared.no_positions[threadIdx.x] = kInvalidKey;
  uint32_t first_entries[3];
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    first_entries[n] = load_entry();
    ahead = line.next(ahead);
  }
#pragma unroll
  for (int n = 0; n < 3; ++n) store_position(n, first_entries[n]);
  __syncthreads();
  gather(0, line.rows(line.at(first_chunk - 1)), threadIdx.x);
  gather(1, line.rows(chunk), threadIdx.x);
  uint32_t pending_entry = load_entry();
  Unit::copy_async_wait_and_sync();
  const auto clear_padding = [&](uint32_t slot, uint32_t thread) {
    if (args.key_padding_mask == nullptr) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      clear_rows(shared.v[slot][part], thread,
                 [&](uint32_t row) { return shared.key_position[slot][row] == kInvalidKey; });
    }
    Unit::fence_shared();  // a barrier stands before the products
  };
  clear_padding(0, threadIdx.x);
  const float first_square = row_square<Element, kHeadDim>(shared.q[0][0], threadIdx.x);
  shared.key_scale[0][threadIdx.x / 2] = args.scale_log2 * inverse_norm(first_square);

  for (uint32_t n = 1; n <= steps; ++n) {
    const uint32_t thread = renewed(threadIdx.x);
    // The first of the thread's two rows; the other is 8 below.
    const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4;
    const uint32_t previous = (n - 1) % kSlots, current = n % kSlots;

    Unit::copy_async_wait_and_sync();
    clear_padding(current, thread);
    const auto gather_next = [&] {
      if (n < steps) gather(n + 1, line.rows(line.next(chunk)), thread);
    };
    if constexpr (kQuerySlots<Unit> == kSlots) gather_next();
    if constexpr (!kLateStore) store_position(n + 2, pending_entry);
    if constexpr (!kLateEntries) {
      ahead = line.next(ahead);
      pending_entry = load_entry();
    }
    const auto load_bits = [&](PairTile tile) {
      return load_pair_bits<kMasks>(args.masks, line, chunk, tile, thread);
    };
    const PairBits current_bits = load_bits(kOwnKeys);

    // Scores of both key tiles, the chunk's own first.
    FragmentsOf<kHeadDim> query;
    const auto& current_q = shared.q[n % kQuerySlots<Unit>];
    load_fragments(query, shared_address(current_q), thread);
    Accumulator previous_scores, current_scores;
    Unit::fence();
    Unit::multiply_abt(current_scores, query, Unit::operand(current_q, thread));
    Unit::multiply_abt(previous_scores, query,
                       Unit::operand(shared.q[(n - 1) % kQuerySlots<Unit>], thread));

    int query_bounds[2];
    float squares[2], shifts[2], sums[2] = {0.0F, 0.0F};
    Unit::template wait<1>();
    Unit::pin(current_scores);
    read_diagonal(squares, current_scores, thread);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = upper_row + 8 * half;
      const float scale = args.scale_log2 * inverse_norm(squares[half]);
      shifts[half] = scale * squares[half];
      if (thread % 4 == 0) shared.key_scale[current][row] = scale;
      query_bounds[half] = query_bound<kCausal>(line, shared.position[n % kPositionSlots][row]);
    }
    if constexpr (kLateStore) store_position(n + 2, pending_entry);
    __syncthreads();
    if constexpr (kQuerySlots<Unit> < kSlots) gather_next();
    const float* key_scales[2] = {shared.key_scale[previous], shared.key_scale[current]};
    const int* key_positions[2] = {
        line.has_previous(chunk) ? shared.key_position[previous] : shared.no_positions,
        shared.key_position[current]};
    const Pairs<true, kCausal, kMasks> previous_pairs{query_bounds, load_bits(kPreviousKeys)};
    const Pairs<true, kCausal, kMasks> current_pairs{query_bounds, current_bits};

    // Softmax over both tiles, in base 2. A row without any key keeps sum 0.
    // A row that is not a number anyway does not decide for the others.
    if (__any_sync(0xffffffff, fmaxf(shifts[0], shifts[1]) > largest_bound<Element>())) {
      float maxima[2] = {-INFINITY, -INFINITY};
      Unit::template wait<0>();
      Unit::pin(previous_scores);
      fold_maxima(maxima, previous_scores, key_scales[0], key_positions[0],
                  previous_pairs.renewed(), thread);
      fold_maxima(maxima, current_scores, key_scales[1], key_positions[1], current_pairs.renewed(),
                  thread);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float maximum = quad_max(maxima[half]);
        shifts[half] = maximum == -INFINITY ? 0.0F : maximum;
      }
    }
    Fragments previous_weights, current_weights;
    AccumulatorOf<kTileColumns<kHeadDim>> output[kParts];
    const auto multiply_values = [&](const Fragments& weights, uint32_t slot, bool accumulate) {
      Unit::fence();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Unit::multiply_ab(output[part], weights, Unit::operand(shared.v[slot][part], thread),
                          accumulate);
      }
    };
    exponentiate<Element>(current_weights, sums, current_scores, shifts, key_scales[1],
                          key_positions[1], current_pairs.renewed(), thread);
    multiply_values(current_weights, current, false);
    Unit::template wait<kParts>();
    Unit::pin(previous_scores);
    exponentiate<Element>(previous_weights, sums, previous_scores, shifts, key_scales[0],
                          key_positions[0], previous_pairs.renewed(), thread);
    multiply_values(previous_weights, previous, true);

    if constexpr (kLateEntries) {
      ahead = line.next(line.next(line.next(chunk)));
      pending_entry = load_entry();
    }
    const int64_t round_begin = int64_t{chunk.round} * line.length;
    float* lse = partial_lse;
    Element* out = partial_out;
    if constexpr (kFewRegisters) {
      const int64_t rows_before = int64_t{renewed(blockIdx.y)} * line.rounds * line.length;
      lse = args.partial_lse + rows_before;
      out = args.partial_out + rows_before * kHeadDim;
    }
    const int rows = line.rows(chunk);
    const auto& positions = shared.position[n % kPositionSlots];
    float inverse_sums[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = upper_row + 8 * half;
      const float sum = quad_sum(sums[half]);
      inverse_sums[half] = sum > 0.0F ? __fdividef(1.0F, sum) : 0.0F;
      if constexpr (kMasks == kDropped) inverse_sums[half] *= args.masks.dropout_scale;
      if (thread % 4 == 0 && row < rows) {
        float* place = &lse[round_begin + positions[row]];
        const float value = shifts[half] + log2_approx(sum);
        if (line.length > kLongestStreamedRound) {
          store_kept(place, value);
        } else {
          __stcs(place, value);
        }
      }
    }
    Unit::template wait<0>();
    const uint32_t warp = thread / 32, first_row = 16 * warp;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      constexpr int kColumns = kTileColumns<kHeadDim>;
      Unit::pin(output[part]);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) output[part][i / 4][i % 4] *= inverse_sums[i % 4 / 2];
      store_rows<Unit, kColumns, kHeadDim>(
          output[part], out + round_begin * kHeadDim + part * kColumns, &positions[first_row],
          rows - first_row, shared.staging[warp], thread);
    }
    chunk = line.next(chunk);
  }
}

}  // namespace reformer::kernels::tiled

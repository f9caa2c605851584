// Backward main kernel of chunked attention: shared QK, chunks of 64, one chunk back, head dims up
// to
// 64. For either unit of tensor cores: Wgmma or MmaSync.
//
// Key-major: a key chunk meets the queries of its own and of the next chunk, transposed so that P^T
// and dS^T stay in registers as operands of dV += P^T dO and dK += dS^T Q. Only dS^T passes through
// shared memory, for dQ += dS K. A chunk's dQ begins with the previous chunk's keys and ends with
// its own, where dK and dV are complete too: one row of each per (round, position), and no atomics.
#pragma once

#include "chunked_attention/tiled/gradients.cuh"

namespace reformer::kernels::tiled {

enum Tile { kQ, kV, kGradOut, kTiles };

template <typename Unit, bool kOperandsInRegisters = Unit::kOperandsInRegisters>
struct BackwardShared {
  static constexpr int kGradOutTile = kGradOut;
  uint8_t tiles[kSlots][kTiles][kTileBytes];
  uint8_t score_gradients[2][kTileBytes];  // dS^T
  uint8_t staging[kWarps][kStagingBytes];
  RowStats stats[kSlots][kTileRows];
  QueryPair queries[kSlots][kTileRows / 2];
  float deltas[kSlots][kTileRows];
  int position[kPositionSlots][kTileRows];
};

// The values stay in registers for a chunk's two products with them, so that two slots do for their
// tiles; and one tile does for dS^T, as its product is done at once. Two blocks fit an A100's
// multiprocessor.
template <typename Unit>
struct BackwardShared<Unit, true> {
  static constexpr int kGradOutTile = 1;
  uint8_t tiles[kSlots][2][kTileBytes];
  uint8_t values[2][kTileBytes];
  uint8_t score_gradients[1][kTileBytes];
  uint8_t staging[kWarps][kStagingBytes];
  RowStats stats[kSlots][kTileRows];
  QueryPair queries[kSlots][kTileRows / 2];
  float deltas[kSlots][kTileRows];
  int position[kPositionSlots][kTileRows];
};

// grad_k, projected, plus grad_q. Result in grad_k.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void add_projected(AccumulatorOf<kHeadDim>& grad_k,
                                              const PackedTile<kHeadDim>& grad_q,
                                              const uint8_t* q_tile, uint32_t upper_row,
                                              const float (&key_scales)[2], uint32_t thread) {
  PackedTile<kHeadDim> q;
  load_packed(q, q_tile, upper_row, thread);
  float factors[2] = {0.0F, 0.0F};
  add_dots<Element>(factors, grad_k, q);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factors[half] = projection(quad_sum(factors[half]), key_scales[half]);
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) {
    const int j = i / 2, half = i % 2;
    const float2 pair = unpack<Element>(q[j][half]), sum = unpack<Element>(grad_q[j][half]);
    grad_k[j][2 * half] += sum.x - factors[half] * pair.x;
    grad_k[j][2 * half + 1] += sum.y - factors[half] * pair.y;
  }
}

// The body of the kernel.
template <typename Unit, int kHeadDim, bool kCausal, int kMasks>
__device__ __forceinline__ void attend_backward(const BackwardArgs<typename Unit::Element>& args) {
  using Element = typename Unit::Element;
  wait_for_previous_kernel();
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  using Shared = BackwardShared<Unit>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const Line& line = args.line;

  const int first_chunk = blockIdx.x * args.run_length;
  const uint32_t steps = min(args.run_length, line.chunks() - first_chunk);
  const int local_head = blockIdx.y, head = args.head_begin + local_head, batch = head / args.heads;
  const int64_t rows_per_head = int64_t{line.rounds} * line.length;

  const int32_t* order =
      args.order == nullptr ? nullptr : args.order + int64_t{head} * rows_per_head;
  const uint8_t* q = args.q.head(batch, head % args.heads);
  const uint8_t* v = args.v.head(batch, head % args.heads);
  const uint8_t* grad_out = args.grad_out.head(batch, head % args.heads);
  const uint8_t* row_stats = args.row_stats.head(batch, head % args.heads);
  Element* partial_q = args.partial_q + local_head * rows_per_head * kHeadDim;
  Element* partial_v = args.partial_v + local_head * rows_per_head * kHeadDim;

  // Chunks are numbered from the run's predecessor on. While the keys of chunk n meet the queries
  // of chunk n + 1, chunk n + 2 is copied and the positions of chunk n + 4 are loaded.
  Chunk chunk = line.at(first_chunk), ahead = line.at(first_chunk - 1);
  const auto load_entry = [&] {
    const int slot = ahead.index * kTileRows + threadIdx.x;
    return threadIdx.x < kTileRows ? order_at(line, order, ahead.round, slot) : 0;
  };
  const auto store_position = [&](uint32_t n, uint32_t entry) {
    if (threadIdx.x < kTileRows)
      shared.position[n % kPositionSlots][threadIdx.x] = position_of(line, entry);
  };
  const auto gather = [&](uint32_t n, uint32_t rows, uint32_t thread) {
    const uint32_t slot = n % kSlots;
    const auto& positions = shared.position[n % kPositionSlots];
    auto& tiles = shared.tiles[slot];
    typename Copy<kHeadDim>::Positions copied;
    read_copied_positions<kHeadDim>(copied, positions, thread);
    const uint8_t *q_rows = q, *v_rows = v, *grad_out_rows = grad_out;
    if constexpr (Unit::kOperandsInRegisters && kMasks != kPlain) {  // few registers are left
      const int sequence = args.head_begin + renewed(blockIdx.y);
      q_rows = args.q.head(sequence / args.heads, sequence % args.heads);
      v_rows = args.v.head(sequence / args.heads, sequence % args.heads);
      grad_out_rows = args.grad_out.head(sequence / args.heads, sequence % args.heads);
    }
    gather_tile<kHeadDim>(shared_address(tiles[kQ]), q_rows, args.q.row_bytes, copied, thread);
    if constexpr (Unit::kOperandsInRegisters) {
      gather_tile<kHeadDim>(shared_address(shared.values[n % 2]), v_rows, args.v.row_bytes, copied,
                            thread);
    } else {
      gather_tile<kHeadDim>(shared_address(tiles[kV]), v_rows, args.v.row_bytes, copied, thread);
    }
    gather_tile<kHeadDim>(shared_address(tiles[Shared::kGradOutTile]), grad_out_rows,
                          args.grad_out.row_bytes, copied, thread);
    if (thread < kTileRows) {
      copy_row_stats<kHeadDim>(shared.stats[slot], shared.queries[slot], shared.deltas[slot],
                               row_stats, args.row_stats.row_bytes, positions[thread], thread,
                               thread < rows);
    }
    copy_async_commit();
  };

  uint32_t first_entries[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    first_entries[n] = load_entry();
    ahead = line.next(ahead);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) store_position(n, first_entries[n]);
  __syncthreads();
  gather(0, line.rows(line.at(first_chunk - 1)), threadIdx.x);
  gather(1, line.rows(chunk), threadIdx.x);
  uint32_t pending_entry = load_entry();

  AccumulatorOf<kHeadDim> grad_q, grad_k, grad_v;
  uint32_t buffer = 0;           // of score_gradients
  FragmentsOf<kHeadDim> values;  // of the keys, if operands are in registers
  const auto load_values = [&](uint32_t keys) {
    if constexpr (Unit::kOperandsInRegisters) {
      load_fragments(values, shared_address(shared.values[keys % 2]), renewed(threadIdx.x));
    }
  };

  // The keys of chunk `keys` meet the queries of chunk `queries`. First products start a sum, later
  // ones add to it. Leaves the product for grad_q running.
  const auto attend = [&](uint32_t keys, uint32_t queries, Chunk query_chunk, bool neighbours,
                          auto with_key_gradients, bool add_to_keys, bool add_to_queries) {
    constexpr bool kWithKeyGradients = decltype(with_key_gradients)::value;
    const uint32_t thread = renewed(threadIdx.x);
    // The first of the thread's two rows; the other is 8 below.
    const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4;
    const uint32_t key_slot = keys % kSlots, query_slot = queries % kSlots;
    const auto operand = [&](uint32_t slot, int tile) {
      return Unit::operand(shared.tiles[slot][tile], thread);
    };

    Accumulator scores, weight_gradients;
    Unit::fence();
    Unit::template multiply_abt<kHeadDim / 16>(scores, operand(key_slot, kQ),
                                               operand(query_slot, kQ));
    if constexpr (Unit::kOperandsInRegisters) {
      Unit::multiply_abt(weight_gradients, values, operand(query_slot, Shared::kGradOutTile));
    } else {
      Unit::template multiply_abt<kHeadDim / 16>(weight_gradients, operand(key_slot, kV),
                                                 operand(query_slot, Shared::kGradOutTile));
    }

    const PairBits bits = load_pair_bits<kMasks>(
        args.masks, line, query_chunk, keys == queries ? kOwnKeys : kPreviousKeys, thread);
    float logit_scales[2], gradient_scales[2];
    int key_bounds[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = upper_row + 8 * half;
      const RowStats& stats = shared.stats[key_slot][row];
      logit_scales[half] = stats.key_scale * args.scale_log2;
      gradient_scales[half] = gradient_scale<Element>(stats.key_scale, args.scale);
      key_bounds[half] = key_bound<kCausal>(line, shared.position[keys % kPositionSlots][row],
                                            neighbours && stats.is_padding == 0.0F);
    }
    Fragments weights, gradients;
    Unit::template wait<1>();
    Unit::pin(scores);
    const auto pairs = [&] { return Pairs<false, kCausal, kMasks>(key_bounds, bits).renewed(); };
    recompute_weights<Element>(weights, scores, logit_scales, gradient_scales, pairs(),
                               shared.queries[query_slot], thread);
    if constexpr (kWithKeyGradients) {
      Unit::fence();
      Unit::multiply_ab(grad_v, weights, operand(query_slot, Shared::kGradOutTile), add_to_keys);
      Unit::template wait<1>();
    } else {
      Unit::template wait<0>();
    }
    Unit::pin(weight_gradients);
    score_gradients<Element>(gradients, scores, weight_gradients, pairs(), args.masks.dropout_scale,
                             shared.deltas[query_slot], thread);
    uint8_t* score_tile = shared.score_gradients[buffer];
    // Has every warp read the last one? The other pairs follow a barrier.
    if constexpr (Unit::kOperandsInRegisters) {
      if (keys == queries) __syncthreads();
    }
    Unit::store_fragments(shared_address(score_tile), gradients, thread);
    if constexpr (kWithKeyGradients) {
      Unit::fence();
      Unit::multiply_ab(grad_k, gradients, operand(query_slot, kQ), add_to_keys);
    }
    Unit::fence_shared();
    __syncthreads();
    Unit::fence();
    Unit::multiply_atb(grad_q, Unit::operand(score_tile, thread), operand(key_slot, kQ),
                       add_to_queries);
    if constexpr (!Unit::kOperandsInRegisters) buffer ^= 1;
  };

  const auto clear_padding = [&](uint32_t n) {
    const uint32_t thread = renewed(threadIdx.x), slot = n % kSlots;
    const auto is_spoilt = [&](uint32_t row) {
      return shared.stats[slot][row].is_padding == kSpoiltPadding;
    };
    clear_rows(shared.tiles[slot][kQ], thread, is_spoilt);
    clear_rows(shared.tiles[slot][Shared::kGradOutTile], thread, is_spoilt);
    if constexpr (Unit::kOperandsInRegisters) {
      clear_rows(shared.values[n % 2], thread, is_spoilt);
    } else {
      clear_rows(shared.tiles[slot][kV], thread, is_spoilt);
    }
  };
  const auto show_cleared = [] {
    Unit::fence_shared();
    __syncthreads();
  };

  Unit::copy_async_wait_and_sync();
  if (args.has_padding) {
    clear_padding(0);
    clear_padding(1);
    show_cleared();
  }
  load_values(0);
  if constexpr (Unit::kOperandsInRegisters) __syncthreads();
  gather(2, line.rows(line.next(chunk)), threadIdx.x);
  attend(0, 1, chunk, line.has_previous(chunk), std::false_type{}, false, false);
  for (uint32_t n = 1; n <= steps; ++n) {
    load_values(n);
    attend(n, n, chunk, true, std::true_type{}, false, true);
    PackedTile<kHeadDim> grad_q_rows;
    Unit::template wait<0>();
    Unit::pin(grad_q);
    pack_tile<Element>(grad_q_rows, grad_q);

    // Chunk n - 1 is done with in every warp: its slot takes chunk n + 2.
    const Chunk next = line.next(chunk);
    store_position(n + 3, pending_entry);
    Unit::copy_async_wait_and_sync();
    if (args.has_padding) {
      clear_padding(n + 1);
      show_cleared();
    }
    if (n < steps) {
      gather(n + 2, line.rows(line.next(next)), renewed(threadIdx.x));
    }
    ahead = line.next(ahead);
    pending_entry = load_entry();
    attend(n, n + 1, next, line.has_previous(next), std::true_type{}, true, false);

    Unit::template wait<1>();  // all but grad_q of chunk n + 1
    Unit::pin(grad_k);
    Unit::pin(grad_v);
    const uint32_t thread = renewed(threadIdx.x);
    const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4, slot = n % kSlots;
    const float key_scales[2] = {shared.stats[slot][upper_row].key_scale,
                                 shared.stats[slot][upper_row + 8].key_scale};
    add_projected<Element, kHeadDim>(grad_k, grad_q_rows, shared.tiles[slot][kQ], upper_row,
                                     key_scales, thread);
    const uint32_t warp = thread / 32, first_row = 16 * warp;
    const int* positions = &shared.position[n % kPositionSlots][first_row];
    const int64_t round_begin = int64_t{chunk.round} * line.length * kHeadDim;
    const int count = line.rows(chunk) - static_cast<int>(first_row);
    store_rows<Unit, kHeadDim>(grad_k, partial_q + round_begin, positions, count,
                               shared.staging[warp], thread);
    if constexpr (kMasks == kDropped) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) grad_v[i / 4][i % 4] *= args.masks.dropout_scale;
    }
    store_rows<Unit, kHeadDim>(grad_v, partial_v + round_begin, positions, count,
                               shared.staging[warp], thread);
    chunk = next;
  }
  Unit::template wait<0>();
}

}  // namespace reformer::kernels::tiled

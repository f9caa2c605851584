// Backward main kernel of chunked attention by wgmma for head_dim 128: shared QK, chunks of 64, one
// chunk back.
//
// Two warpgroups, since the gradients of a chunk fill the registers of one. In step n the keys of
// chunk n meet, transposed, the queries of chunk n (first warpgroup) and of chunk n + 1 (second).
// The warpgroups exchange P^T and dS^T through shared memory; then each makes its 64 columns of
//   dV = P^T dO and dK = dS^T Q over both pairs, its own pair's P^T and dS^T from registers, and of
//   dQ = dS K over the pairs (n - 1, n), whose dS^T the last step left behind, and (n, n),
// while it computes the P^T and dS^T of the next step. One row of each gradient per (round,
// position), and no atomics.
#include "chunked_attention/tiled/gradients.cuh"
#include "tensor_core/wgmma.cuh"

namespace reformer::kernels::tiled {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kBlockThreads = kWarpgroups * kThreads;
constexpr int kLongestRun = 64;

constexpr int kHeadDim = 128;
// Columns of a tile, and of the gradients of a warpgroup.
[[maybe_unused]] constexpr int kHalf = kHeadDim / 2;
// The warpgroup whose keys and queries are of the same chunk.
[[maybe_unused]] constexpr uint32_t kDiagonal = 0;

// Chunks that are in use at the same time. In step n, products need q of chunks n - 1 to n + 1 and
// the next scores chunk n + 2, while n + 3 is copied.
constexpr int kQSlots = 5;
constexpr int kGradOutSlots = 4;
constexpr int kVSlots = 2;
constexpr int kStatsSlots = 4;
constexpr int kPositionRing = 8;

using WideTile = uint8_t[2][kTileBytes];  // 64 rows: the first 64 columns, the others

struct BackwardShared {
  WideTile q[kQSlots];
  WideTile grad_out[kGradOutSlots];
  WideTile v[kVSlots];  // once its chunk's weight gradients are known, staging for stores
  uint8_t weights[kWarpgroups][kTileBytes];  // P^T by pair
  uint8_t diagonal_gradients[kTileBytes];    // dS^T of chunk n with itself
  uint8_t next_gradients[2][kTileBytes];  // dS^T of the keys of chunk n with chunk n + 1, by n % 2
  RowStats stats[kStatsSlots][kTileRows];
  QueryPair queries[kStatsSlots][kTileRows / 2];
  float deltas[kStatsSlots][kTileRows];
  int position[kPositionRing][kTileRows];
  float dots[kWarpgroups][kTileRows];  // of rows of grad_k and q, over the warpgroup's columns
};
static_assert(sizeof(BackwardShared) <= 227 * 1024);
static_assert(kWarps * kStagingBytes * kWarpgroups <= sizeof(WideTile));

template <typename Element, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kBlockThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArgs<Element> args) {
#ifdef REFORMER_SM90A
  wait_for_previous_kernel();
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  BackwardShared& shared = *reinterpret_cast<BackwardShared*>(shared_bytes);
  const Line& line = args.line;

  const int first_chunk = blockIdx.x * args.run_length;
  const uint32_t steps = min(args.run_length, line.chunks() - first_chunk);
  const int local_head = blockIdx.y, head = args.head_begin + local_head, batch = head / args.heads;
  const int64_t rows_per_head = int64_t{line.rounds} * line.length;
  // The same in all lanes, and known to be.
  const uint32_t warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kThreads, 0);
  const uint32_t first_column = warpgroup * kHalf;

  const int32_t* order =
      args.order == nullptr ? nullptr : args.order + int64_t{head} * rows_per_head;
  const uint8_t* row_stats = args.row_stats.head(batch, head % args.heads);
  // From here on, the warpgroup's columns.
  const uint32_t first_byte = first_column * sizeof(Element);
  const uint8_t* q = args.q.head(batch, head % args.heads) + first_byte;
  const uint8_t* v = args.v.head(batch, head % args.heads) + first_byte;
  const uint8_t* grad_out = args.grad_out.head(batch, head % args.heads) + first_byte;
  Element* partial_q = args.partial_q + local_head * rows_per_head * kHeadDim + first_column;
  Element* partial_v = args.partial_v + local_head * rows_per_head * kHeadDim + first_column;

  // Chunks are numbered from the run's predecessor on. In step n, q and grad_out of chunk n + 3 and
  // v of chunk n + 2 are copied and the positions of chunk n + 5 are loaded.
  Chunk previous = line.at(first_chunk - 1), chunk = line.at(first_chunk), ahead = previous;
  const auto load_entry = [&] {
    const Chunk loaded = ahead;
    ahead = line.next(ahead);
    const int slot = loaded.index * kTileRows + threadIdx.x;
    return threadIdx.x < kTileRows ? order_at(line, order, loaded.round, slot) : 0;
  };
  const auto positions = [&](uint32_t n) -> auto& { return shared.position[n % kPositionRing]; };
  const auto store_position = [&](uint32_t n, uint32_t entry) {
    if (threadIdx.x < kTileRows) positions(n)[threadIdx.x] = position_of(line, entry);
  };
  const auto thread_in_warpgroup = [] { return renewed(threadIdx.x) % kThreads; };

  // Each warpgroup copies its columns.
  const auto gather_queries = [&](uint32_t n, Chunk chunk) {
    const uint32_t thread = thread_in_warpgroup();
    Copy<kHalf>::Positions copied;
    read_copied_positions<kHalf>(copied, positions(n), thread);
    gather_tile<kHalf>(shared_address(shared.q[n % kQSlots][warpgroup]), q, args.q.row_bytes,
                       copied, thread);
    gather_tile<kHalf>(shared_address(shared.grad_out[n % kGradOutSlots][warpgroup]), grad_out,
                       args.grad_out.row_bytes, copied, thread);
    if (threadIdx.x < kTileRows) {
      const uint32_t row = threadIdx.x, slot = n % kStatsSlots;
      copy_row_stats<kHeadDim>(shared.stats[slot], shared.queries[slot], shared.deltas[slot],
                               row_stats, args.row_stats.row_bytes, positions(n)[row], row,
                               static_cast<int>(row) < line.rows(chunk));
    }
    copy_async_commit();
  };
  const auto gather_values = [&](uint32_t n) {
    const uint32_t thread = thread_in_warpgroup();
    Copy<kHalf>::Positions copied;
    read_copied_positions<kHalf>(copied, positions(n), thread);
    gather_tile<kHalf>(shared_address(shared.v[n % kVSlots][warpgroup]), v, args.v.row_bytes,
                       copied, thread);
    copy_async_commit();
  };

  Accumulator scores, weight_gradients, grad_q, grad_k, grad_v;
  Fragments weights, gradients;   // P^T and dS^T of the warpgroup's pair
  PackedTile<kHalf> projected_q;  // rows of q whose gradients are complete
  float dots[2], key_scales[2];   // of those rows

  const auto descriptor = [](const auto& tile) { return tile_descriptor(shared_address(tile)); };
  const auto begin_scores = [&](uint32_t n) {
    const uint32_t queries = n + warpgroup;
    wgmma_fence();
    multiply_abt<Element, kHeadDim / 16>(scores, descriptor(shared.q[n % kQSlots]),
                                         descriptor(shared.q[queries % kQSlots]));
    multiply_abt<Element, kHeadDim / 16>(weight_gradients, descriptor(shared.v[n % kVSlots]),
                                         descriptor(shared.grad_out[queries % kGradOutSlots]));
  };

  // Of the warpgroup's pair, whose keys are `chunk`.
  const auto load_bits = [&](Chunk chunk) {
    return load_pair_bits<kMasks>(
        args.masks, line, warpgroup == kDiagonal ? chunk : line.next(chunk),
        warpgroup == kDiagonal ? kOwnKeys : kPreviousKeys, thread_in_warpgroup());
  };

  // What the thread's two keys of chunk n, now `chunk`, contribute to their pairs.
  float logit_scales[2], gradient_scales[2];
  int key_bounds[2];
  const auto load_keys = [&](uint32_t n, Chunk chunk) {
    const uint32_t thread = thread_in_warpgroup();
    const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4;
    const bool neighbours = warpgroup == kDiagonal || line.has_previous(line.next(chunk));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = upper_row + 8 * half;
      const RowStats& stats = shared.stats[n % kStatsSlots][row];
      logit_scales[half] = stats.key_scale * args.scale_log2;
      gradient_scales[half] = gradient_scale<Element>(stats.key_scale, args.scale);
      key_bounds[half] =
          key_bound<kCausal>(line, positions(n)[row], neighbours && stats.is_padding == 0.0F);
    }
  };

  // Makes weights and gradients from the scores of those keys.
  const auto weigh = [&](uint32_t n, PairBits bits) {
    const uint32_t thread = thread_in_warpgroup();
    const uint32_t query_slot = (n + warpgroup) % kStatsSlots;
    pin(scores);
    pin(weight_gradients);
    const Pairs<false, kCausal, kMasks> pairs(key_bounds, bits);
    recompute_weights<Element>(weights, scores, logit_scales, gradient_scales, pairs.renewed(),
                               shared.queries[query_slot], thread);
    score_gradients<Element>(gradients, scores, weight_gradients, pairs.renewed(),
                             args.masks.dropout_scale, shared.deltas[query_slot], thread);
  };

  // Shows the pair's weights and gradients to the other warpgroup after the next barrier.
  const auto show = [&](uint32_t n) {
    const uint32_t thread = thread_in_warpgroup();
    uint8_t* tile =
        warpgroup == kDiagonal ? shared.diagonal_gradients : shared.next_gradients[n % 2];
    store_fragments(shared_address(shared.weights[warpgroup]), weights, thread);
    store_fragments(shared_address(tile), gradients, thread);
    fence_shared_for_wgmma();
  };

  // The gradients of chunk n are complete. Their rows leave in two steps, as the projection of
  // grad_k takes both warpgroups' columns: a barrier lies between.
  const auto finish_gradients = [&](uint32_t n) {
    const uint32_t thread = thread_in_warpgroup();
    const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4;
    load_packed(projected_q, shared.q[n % kQSlots][warpgroup], upper_row, thread);
    dots[0] = dots[1] = 0.0F;
    add_dots<Element>(dots, grad_k, projected_q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = upper_row + 8 * half;
      dots[half] = quad_sum(dots[half]);
      if (thread % 4 == 0) shared.dots[warpgroup][row] = dots[half];
      key_scales[half] = shared.stats[n % kStatsSlots][row].key_scale;
    }
  };
  const auto store_gradients = [&](uint32_t n, Chunk chunk) {
    const uint32_t thread = thread_in_warpgroup(), warp = thread / 32, first_row = 16 * warp;
    const uint32_t upper_row = first_row + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dots[half] += shared.dots[warpgroup ^ 1][upper_row + 8 * half];
      const float factor = projection(dots[half], key_scales[half]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 pair = unpack<Element>(projected_q[j][half]);
        grad_q[j][2 * half] += grad_k[j][2 * half] - factor * pair.x;
        grad_q[j][2 * half + 1] += grad_k[j][2 * half + 1] - factor * pair.y;
      }
    }
    const int64_t round_begin = int64_t{chunk.round} * line.length * kHeadDim;
    const int count = line.rows(chunk) - static_cast<int>(first_row);
    const int* rows = &positions(n)[first_row];
    uint8_t* staging = shared.v[(n + 1) % kVSlots][warpgroup] + warp * kStagingBytes;
    store_rows<Wgmma<Element>, kHalf, kHeadDim>(grad_q, partial_q + round_begin, rows, count,
                                                staging, thread);
    if constexpr (kMasks == kDropped) {
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) grad_v[i / 4][i % 4] *= args.masks.dropout_scale;
    }
    store_rows<Wgmma<Element>, kHalf, kHeadDim>(grad_v, partial_v + round_begin, rows, count,
                                                staging, thread);
  };

  // By stats of a chunk, rows of its tiles become zeros; each warpgroup sees to its columns.
  const auto clear_padding = [&](const WideTile& tile, uint32_t n) {
    clear_rows(const_cast<uint8_t*>(tile[warpgroup]), thread_in_warpgroup(), [&](uint32_t row) {
      return shared.stats[n % kStatsSlots][row].is_padding == kSpoiltPadding;
    });
  };
  const auto show_cleared = [] {
    fence_shared_for_wgmma();
    __syncthreads();
  };

  uint32_t first_entries[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) first_entries[n] = load_entry();
#pragma unroll
  for (int n = 0; n < 4; ++n) store_position(n, first_entries[n]);
  __syncthreads();
  gather_queries(0, previous);
  gather_queries(1, chunk);
  gather_queries(2, line.next(chunk));
  gather_values(0);
  gather_values(1);
  uint32_t pending_entry = load_entry();
  copy_async_wait_and_sync();
  if (args.has_padding) {
#pragma unroll 1
    for (uint32_t n = 0; n < 3; ++n) {
      clear_padding(shared.q[n], n);
      clear_padding(shared.grad_out[n], n);
      if (n < kVSlots) clear_padding(shared.v[n], n);
    }
    show_cleared();
  }

  // Step 0: of the keys of the run's predecessor only the gradients of scores with chunk 1 matter.
  begin_scores(0);
  PairBits bits = load_bits(previous);
  load_keys(0, previous);
  wgmma_wait<0>();
  weigh(0, bits);
  show(0);
  __syncthreads();
  store_position(4, pending_entry);
  pending_entry = load_entry();
  if (steps > 1) {
    gather_queries(3, line.next(line.next(chunk)));
    gather_values(2);
  }
  begin_scores(1);
  bits = load_bits(chunk);
  load_keys(1, chunk);
  wgmma_wait<0>();
  weigh(1, bits);

  for (uint32_t n = 1; n <= steps; ++n) {
    if (n > 1) finish_gradients(n - 1);
    copy_async_wait_and_sync();
    if (args.has_padding && n < steps) {
      clear_padding(shared.q[(n + 2) % kQSlots], n + 2);
      clear_padding(shared.grad_out[(n + 2) % kGradOutSlots], n + 2);
      clear_padding(shared.v[(n + 1) % kVSlots], n + 1);
      show_cleared();
    }
    show(n);
    begin_scores(n + 1);
    store_position(n + 4, pending_entry);
    pending_entry = load_entry();
    const Chunk next = line.next(chunk);
    if (n + 2 <= steps) gather_queries(n + 3, line.next(line.next(next)));
    if (n > 1) store_gradients(n - 1, previous);
    previous = chunk;
    chunk = next;

    const uint32_t own = n + warpgroup, other = n + 1 - warpgroup;
    wgmma_fence();
    multiply_ab<Element>(grad_v, weights,
                         descriptor(shared.grad_out[own % kGradOutSlots][warpgroup]), false);
    multiply_ab<Element>(grad_k, gradients, descriptor(shared.q[own % kQSlots][warpgroup]), false);
    __syncthreads();
    if (n + 2 <= steps) gather_values(n + 2);
    const auto& other_gradients =
        warpgroup == kDiagonal ? shared.next_gradients[n % 2] : shared.diagonal_gradients;
    wgmma_fence();
    multiply_ab<Element>(grad_v, descriptor(shared.weights[warpgroup ^ 1]),
                         descriptor(shared.grad_out[other % kGradOutSlots][warpgroup]), true);
    multiply_ab<Element>(grad_k, descriptor(other_gradients),
                         descriptor(shared.q[other % kQSlots][warpgroup]), true);
    multiply_atb<Element>(grad_q, descriptor(shared.next_gradients[(n - 1) % 2]),
                          descriptor(shared.q[(n - 1) % kQSlots][warpgroup]), false);
    multiply_atb<Element>(grad_q, descriptor(shared.diagonal_gradients),
                          descriptor(shared.q[n % kQSlots][warpgroup]), true);

    bits = load_bits(chunk);
    load_keys(n + 1, chunk);
    wgmma_wait<4>();  // all but the products with operands in shared memory alone
    weigh(n + 1, bits);
    wgmma_wait<0>();
    pin(grad_q);
    pin(grad_k);
    pin(grad_v);
  }
  finish_gradients(steps);
  __syncthreads();
  store_gradients(steps, previous);
#endif
}

template <typename Element, bool kCausal, int kMasks>
cudaError_t launch_backward(const ChunkedAttentionBackwardParams& params,
                            const BackwardStage& stage, cudaStream_t stream) {
  return launch_pass(backward_kernel<Element, kCausal, kMasks>,
                     BackwardArgs<Element>(params, stage), stage.head_count, kBlockThreads,
                     sizeof(BackwardShared), 1, kLongestRun, stream);
}

}  // namespace

cudaError_t backward_128(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                         cudaStream_t stream) {
  return dispatch_masks<kHeadDim>(params, [&](auto element, auto, auto causal, auto masks) {
    return launch_backward<decltype(element), causal(), masks()>(params, stage, stream);
  });
}

}  // namespace reformer::kernels::tiled

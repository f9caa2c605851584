// Backward pass of local attention by wgmma, from the final lse: separate keys in natural order,
// chunks of whole tiles. Two kernels, so that nothing is added by atomics and no sum leaves the
// registers before it is complete:
//
//   query_kernel  tiles of queries walk over their keys:  delta, then dQ = scale dS K
//   key_kernel    tiles of keys walk over their queries:  dV = P^T dO, dK = scale dS^T Q
//
// P = exp2(scale log2(e) Q K^T - lse), dS = P (dO V^T - delta). The key kernel computes both
// transposed, so that P^T and dS^T too stay in registers, as operands.
#include "chunked_attention/local/local.cuh"

namespace reformer::kernels {
namespace tiled::local {
namespace {

struct BackwardArgs {
  Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const bool* key_padding_mask;
  const float* lse;
  const float* grad_lse;  // null: zero
  float* stats;           // [B * H, 2, padded length]: what RowStats calls lse and delta
  TileLine line;
  int heads;
  float scale, scale_log2;  // scale_log2: scale * log2(e)
  bool own_values_apart;
};

// By registers: four warpgroups to a multiprocessor with 128 each, or three with 168.
template <int kHeadDim>
struct QueryShape : Shape<kHeadDim> {
  static constexpr bool kWide = kHeadDim > 64;
  static constexpr int kGroups = kWide ? 3 : 2;          // warpgroups
  static constexpr int kResidentBlocks = kWide ? 1 : 2;  // per multiprocessor
  static constexpr int kThreads = kGroups * kWarpgroupThreads;
  static constexpr int kStages = kWide ? 3 : 4;  // of the ring
};

template <int kHeadDim>
struct QueryShared {
  static constexpr int kGroups = QueryShape<kHeadDim>::kGroups;
  static constexpr int kStages = QueryShape<kHeadDim>::kStages;
  TileBytes<kHeadDim> queries[kGroups], output_gradients[kGroups];
  TileBytes<kHeadDim> keys[kStages], values[kStages];
  int key_positions[kStages][kTileRows];
  float lse[kGroups][kTileRows], delta[kGroups][kTileRows];
};

// One warpgroup to a block; three blocks to a multiprocessor with 168 registers, or two with 255.
template <int kHeadDim>
struct KeyShape : Shape<kHeadDim> {
  static constexpr bool kWide = kHeadDim > 64;
  static constexpr int kResidentBlocks = kWide ? 2 : 3;
  static constexpr int kStages = kWide ? 2 : 3;
};

template <int kHeadDim>
struct KeyShared {
  static constexpr int kStages = KeyShape<kHeadDim>::kStages;
  TileBytes<kHeadDim> keys, values;
  TileBytes<kHeadDim> queries[kStages], output_gradients[kStages];
  float lse[kStages][kTileRows], delta[kStages][kTileRows];
};

// The warp's 16 rows of dO, in shared memory, times those of the output, and their lse: to shared
// memory for this warp, to global memory for the key kernel.
template <int kHeadDim>
struct OutputRows {
  static constexpr int kPieces = Shape<kHeadDim>::kPieces, kRowsPerPass = 32 / kPieces;
  static constexpr int kPasses = 16 / kRowsPerPass;
  uint4 words[kPasses];
  float lse[kPasses], grad_lse[kPasses];

  // The row of the tile of a pass.
  static __device__ __forceinline__ int row(int pass, uint32_t thread) {
    return static_cast<int>(thread / 32 * 16 + pass * kRowsPerPass + thread % 32 / kPieces);
  }

  __device__ __forceinline__ void load(const BackwardArgs& args, const uint8_t* out, int64_t head,
                                       int first_row, uint32_t thread) {
    const uint32_t piece = thread % kPieces;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int position = min(first_row + row(pass, thread), args.line.length - 1);
      words[pass] =
          __ldg(indexed_address<const uint4>(out + piece * 16, position, args.out.row_bytes));
      const int64_t index = head * args.line.length + position;
      lse[pass] = args.lse[index];
      grad_lse[pass] = args.grad_lse == nullptr ? 0.0F : args.grad_lse[index];
    }
  }

  template <typename Element>
  __device__ __forceinline__ void reduce(const BackwardArgs& args, const uint8_t* output_gradients,
                                         int64_t head, int first_row, float* shared_lse,
                                         float* shared_delta, uint32_t thread) const {
    const uint32_t piece = thread % kPieces;
    float* const stats = args.stats + 2 * head * args.line.padded_length() + first_row;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int tile_row = row(pass, thread);
      const uint4 other = *reinterpret_cast<const uint4*>(
          output_gradients + piece / 8 * kTileBytes + swizzled(tile_row, piece % 8));
      const uint32_t a[4] = {words[pass].x, words[pass].y, words[pass].z, words[pass].w};
      const uint32_t b[4] = {other.x, other.y, other.z, other.w};
      float sum = 0.0F;
      uint32_t cotangent = __float_as_uint(grad_lse[pass]) << 1;  // without signs: 0 for none
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<Element>(a[i]), y = unpack<Element>(b[i]);
        sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
        cotangent |= b[i] & 0x7fff7fff;
      }
#pragma unroll
      for (int offset = kPieces / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, offset);
        cotangent |= __shfl_xor_sync(0xffffffff, cotangent, offset);
      }
      if (piece != 0) continue;
      // Rows past the end, rows without keys and rows without cotangents get no weights.
      const bool real = first_row + tile_row < args.line.length && cotangent != 0;
      const bool has_keys = lse[pass] != -INFINITY && lse[pass] != kSelfOnlyLse;
      const float row_lse = real && has_keys ? bounding_lse(lse[pass] * kLog2E) : INFINITY;
      const float row_delta = real ? sum - grad_lse[pass] : 0.0F;
      shared_lse[tile_row] = stats[tile_row] = row_lse;
      shared_delta[tile_row] = stats[args.line.padded_length() + tile_row] = row_delta;
    }
  }
};

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(QueryShape<kHeadDim>::kThreads,
                                  QueryShape<kHeadDim>::kResidentBlocks)
    query_kernel(const __grid_constant__ BackwardArgs args) {
#ifdef REFORMER_SM90A
  using Tile = QueryShape<kHeadDim>;
  constexpr int kGroups = Tile::kGroups, kStages = Tile::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<QueryShared<kHeadDim>*>(shared_bytes);
  const TileLine& line = args.line;

  const int group = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  const uint32_t thread = threadIdx.x % kWarpgroupThreads;
  const int first_tile = blockIdx.x * kGroups, tile = first_tile + group;
  const int head = blockIdx.y, batch = head / args.heads, head_in_batch = head % args.heads;
  const bool* padding = args.key_padding_mask == nullptr
                            ? nullptr
                            : args.key_padding_mask + int64_t{batch} * line.length;
  const uint8_t* q = args.q.head(batch, head_in_batch);
  const uint8_t* k = args.k.head(batch, head_in_batch);
  const uint8_t* v = args.v.head(batch, head_in_batch);
  const uint8_t* grad_out = args.grad_out.head(batch, head_in_batch);

  // The keys of this warpgroup's queries, among those the block walks over.
  const Span own = tile < line.tiles ? line.keys_of(tile) : Span{0, 0};
  const int begin = line.keys_of(first_tile).begin;
  const int steps = line.keys_of(min(first_tile + kGroups, line.tiles) - 1).end - begin;
  const auto copy = [&](TileBytes<kHeadDim>& destination, const uint8_t* rows, int row_bytes,
                        int first_row) {
    if (Tile::kThreads > kCopyThreads && threadIdx.x >= kCopyThreads) return;
    copy_tile<kHeadDim, kCopyThreads>(shared_address(destination), rows, row_bytes, first_row,
                                      line.length, threadIdx.x);
  };
  const auto load_keys = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages, first_row = line.fold(begin + step) * kTileRows;
      copy(shared.keys[stage], k, args.k.row_bytes, first_row);
      copy(shared.values[stage], v, args.v.row_bytes, first_row);
      if (threadIdx.x < kTileRows) {
        const int row = static_cast<int>(threadIdx.x);
        shared.key_positions[stage][row] = key_position(padding, first_row + row, line.length);
      }
    }
    copy_async_commit();
  };

#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int first_row = (first_tile + i) * kTileRows;
    copy(shared.queries[i], q, args.q.row_bytes, first_row);
    copy(shared.output_gradients[i], grad_out, args.grad_out.row_bytes, first_row);
  }
  copy_async_commit();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_keys(step);

  float lse[2] = {INFINITY, INFINITY}, delta[2] = {0.0F, 0.0F};
  const uint32_t upper_row = thread / 32 * 16 + thread % 32 / 4;
  {
    OutputRows<kHeadDim> rows;
    rows.load(args, args.out.head(batch, head_in_batch), head, tile * kTileRows, thread);
    wait_for_copies_and_sync<kStages - 1>();
    if (tile < line.tiles) {
      rows.template reduce<Element>(args, shared.output_gradients[group], head, tile * kTileRows,
                                    shared.lse[group], shared.delta[group], thread);
    }
    __syncwarp();
    if (tile < line.tiles) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse[half] = shared.lse[group][upper_row + 8 * half];
        delta[half] = shared.delta[group][upper_row + 8 * half];
      }
    }
  }

  Output<kHeadDim> grad_q;
  clear(grad_q);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies_and_sync<kStages - 2>();
    load_keys(step + kStages - 1);
    const int stage = step % kStages, key_tile = line.fold(begin + step);
    if (padding != nullptr) {
      const auto is_unused = [&](uint32_t row) {
        return shared.key_positions[stage][row] == kInvalidKey;
      };
      clear_unused_rows<kHeadDim, Tile::kThreads>(shared.keys[stage], is_unused, threadIdx.x);
      clear_unused_rows<kHeadDim, Tile::kThreads>(shared.values[stage], is_unused, threadIdx.x);
      __syncthreads();
    }
    if (!own.holds(begin + step) || !line.meet(tile, key_tile)) continue;

    const uint32_t keys = tile_descriptor(shared_address(shared.keys[stage]));
    Accumulator scores, weight_gradients;
    wgmma_fence();
    multiply_rows<Element, kHeadDim>(scores, tile_descriptor(shared_address(shared.queries[group])),
                                     keys);
    multiply_rows<Element, kHeadDim>(
        weight_gradients, tile_descriptor(shared_address(shared.output_gradients[group])),
        tile_descriptor(shared_address(shared.values[stage])));
    wgmma_wait<1>();
    tiled::pin(scores);
    if (key_tile == tile || key_tile == line.tiles - 1 || padding != nullptr) {
      mask_scores(scores, line, shared.key_positions[stage],
                  tile * kTileRows + static_cast<int>(upper_row), thread);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& score = scores[i / 4][i % 4];
      score = exp2_approx(fmaf(score, args.scale_log2, -lse[i % 4 / 2]));
    }
    Fragments gradients;
    wgmma_wait<0>();
    tiled::pin(weight_gradients);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float ds[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[e] = scores[j][e] * (weight_gradients[j][e] - delta[e / 2]);
      pack_columns<Element>(gradients, j, ds[0], ds[1], ds[2], ds[3]);
    }
    wgmma_fence();
    accumulate_rows<Element, kHeadDim>(grad_q, gradients, keys);
    wgmma_wait<0>();
    pin(grad_q);
  }
  __syncthreads();  // the memory of the queries takes the result
  if (tile >= line.tiles) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lse[half] == INFINITY) clear_row(grad_q, half);  // no weights, but 0 times what was there
  }
  const float factors[2] = {args.scale, args.scale};
  scale_rows(grad_q, factors);
  store_result<Element, kHeadDim>(grad_q, shared.queries[group],
                                  const_cast<uint8_t*>(args.grad_q.head(batch, head_in_batch)),
                                  args.grad_q.row_bytes, tile * kTileRows, line.length, thread);
#endif
}

// P^T = exp2(logits - lse) from S^T = K Q^T, in place. Rows are keys, columns queries.
template <int kGroups>
__device__ __forceinline__ void recompute_weights(float (&scores)[kGroups][4], const float* lse,
                                                  float scale_log2, uint32_t thread) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(&lse[8 * j + thread % 4 * 2]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[j][e] = exp2_approx(fmaf(scores[j][e], scale_log2, e % 2 == 0 ? -pair.x : -pair.y));
    }
  }
}

// P^T and dS^T = P^T (dP^T - delta) as operands. Both at once, when the accumulators they come from
// are done with: there are no registers for operands beside these.
template <typename Element>
__device__ __forceinline__ void pack_weights_and_gradients(Fragments& weights, Fragments& gradients,
                                                           const Accumulator& p,
                                                           const Accumulator& grad_p,
                                                           const float* delta, uint32_t thread) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(&delta[8 * j + thread % 4 * 2]);
    float ds[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[e] = p[j][e] * (grad_p[j][e] - (e % 2 == 0 ? pair.x : pair.y));
    pack_columns<Element>(weights, j, p[j][0], p[j][1], p[j][2], p[j][3]);
    pack_columns<Element>(gradients, j, ds[0], ds[1], ds[2], ds[3]);
  }
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kWarpgroupThreads, KeyShape<kHeadDim>::kResidentBlocks)
    key_kernel(const __grid_constant__ BackwardArgs args) {
#ifdef REFORMER_SM90A
  constexpr int kStages = KeyShape<kHeadDim>::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<KeyShared<kHeadDim>*>(shared_bytes);
  const TileLine& line = args.line;

  // Backwards: what query_kernel has read last may still be in the cache.
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int head = static_cast<int>(gridDim.y - 1 - blockIdx.y), batch = head / args.heads,
            head_in_batch = head % args.heads;
  const uint8_t* q = args.q.head(batch, head_in_batch);
  const uint8_t* grad_out = args.grad_out.head(batch, head_in_batch);
  const float* stats = args.stats + 2 * head * args.line.padded_length();

  const Span span = line.queries_of(tile);
  const int steps = span.end - span.begin;
  const auto copy = [&](TileBytes<kHeadDim>& destination, const uint8_t* rows, int row_bytes,
                        int first_row, uint32_t thread) {
    copy_tile<kHeadDim, kWarpgroupThreads>(shared_address(destination), rows, row_bytes, first_row,
                                           line.length, thread);
  };
  const auto load_queries = [&](int step, uint32_t thread) {
    if (step < steps) {
      const int stage = step % kStages, first_row = line.fold(span.begin + step) * kTileRows;
      copy(shared.queries[stage], q, args.q.row_bytes, first_row, thread);
      copy(shared.output_gradients[stage], grad_out, args.grad_out.row_bytes, first_row, thread);
      constexpr uint32_t kPieces = kTileRows / 4;  // of 16 bytes, of lse and of delta
      if (thread < 2 * kPieces) {
        const uint32_t offset = thread % kPieces * 4;
        float* const destination = thread < kPieces ? shared.lse[stage] : shared.delta[stage];
        const float* const source = thread < kPieces ? stats : stats + args.line.padded_length();
        copy_async<16>(shared_address(destination + offset), source + first_row + offset);
      }
    }
    copy_async_commit();
  };

  copy(shared.keys, args.k.head(batch, head_in_batch), args.k.row_bytes, tile * kTileRows,
       threadIdx.x);
  copy(shared.values, args.v.head(batch, head_in_batch), args.v.row_bytes, tile * kTileRows,
       threadIdx.x);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_queries(step, threadIdx.x);

  Output<kHeadDim> grad_k, grad_v;
  clear(grad_k);
  clear(grad_v);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies_and_sync<kStages - 2>();
    const uint32_t thread = renewed(threadIdx.x);
    load_queries(step + kStages - 1, thread);
    const int stage = step % kStages, query_tile = line.fold(span.begin + step);
    if (args.key_padding_mask != nullptr) {  // queries that are padding too, and nobody reads
      const auto is_unused = [&](uint32_t row) { return shared.lse[stage][row] == INFINITY; };
      clear_unused_rows<kHeadDim, kWarpgroupThreads>(shared.queries[stage], is_unused, thread);
      clear_unused_rows<kHeadDim, kWarpgroupThreads>(shared.output_gradients[stage], is_unused,
                                                     thread);
      __syncthreads();
    }
    if (!line.meet(query_tile, tile)) continue;

    const uint32_t queries = tile_descriptor(shared_address(shared.queries[stage]));
    const uint32_t output_gradients =
        tile_descriptor(shared_address(shared.output_gradients[stage]));
    Accumulator scores, weight_gradients;
    wgmma_fence();
    multiply_rows<Element, kHeadDim>(scores, tile_descriptor(shared_address(shared.keys)), queries);
    multiply_rows<Element, kHeadDim>(
        weight_gradients, tile_descriptor(shared_address(shared.values)), output_gradients);
    wgmma_wait<1>();
    tiled::pin(scores);
    if (query_tile == tile && (line.causal || line.mask_self)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int upper_row = static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
        const int key = upper_row + i % 4 / 2 * 8;
        const int query = i / 4 * 8 + static_cast<int>(thread % 4 * 2) + i % 2;
        const bool valid = (!line.causal || key <= query) && !(line.mask_self && key == query);
        if (!valid) scores[i / 4][i % 4] = -INFINITY;
      }
    }
    recompute_weights(scores, shared.lse[stage], args.scale_log2, thread);
    Fragments weights, gradients;
    wgmma_wait<0>();
    tiled::pin(weight_gradients);
    pack_weights_and_gradients<Element>(weights, gradients, scores, weight_gradients,
                                        shared.delta[stage], thread);
    wgmma_fence();
    accumulate_rows<Element, kHeadDim>(grad_v, weights, output_gradients);
    accumulate_rows<Element, kHeadDim>(grad_k, gradients, queries);
    wgmma_wait<0>();
    pin(grad_v);
    pin(grad_k);
  }
  __syncthreads();  // the memory of keys and values takes the results

  const uint32_t thread = renewed(threadIdx.x);
  // The first of the thread's two rows; the other is 8 below.
  const int upper_row = static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
  const bool* padding = args.key_padding_mask == nullptr
                            ? nullptr
                            : args.key_padding_mask + int64_t{batch} * line.length;
  const float factors[2] = {args.scale, args.scale};
  scale_rows(grad_k, factors);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = tile * kTileRows + upper_row + 8 * half;
    if (key_position(padding, position, line.length) == kInvalidKey) {
      clear_row(grad_k, half);
      clear_row(grad_v, half);
    } else if (line.mask_self && !args.own_values_apart &&
               args.lse[int64_t{head} * line.length + position] == kSelfOnlyLse) {
      add_row<Element, kHeadDim>(
          grad_v, half, indexed_address<const uint8_t>(grad_out, position, args.grad_out.row_bytes),
          thread);
    }
  }
  store_result<Element, kHeadDim>(grad_k, shared.keys,
                                  const_cast<uint8_t*>(args.grad_k.head(batch, head_in_batch)),
                                  args.grad_k.row_bytes, tile * kTileRows, line.length, thread);
  store_result<Element, kHeadDim>(grad_v, shared.values,
                                  const_cast<uint8_t*>(args.grad_v.head(batch, head_in_batch)),
                                  args.grad_v.row_bytes, tile * kTileRows, line.length, thread);
#endif
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, int tiles, int64_t heads, int threads, int shared_bytes,
                   const BackwardArgs& args, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(tiles, static_cast<unsigned>(heads));
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim>
cudaError_t launch_backward(const ChunkedAttentionBackwardParams& params, cudaStream_t stream) {
  const auto rows = [](const HeadsView& view) { return Rows(view, sizeof(Element)); };
  const BackwardArgs args{rows(params.q),
                          rows(params.k),
                          rows(params.v),
                          rows(params.out),
                          rows(params.grad_out),
                          rows(params.grad_q),
                          rows(params.grad_k),
                          rows(params.grad_v),
                          params.key_padding_mask,
                          params.lse,
                          params.grad_lse,
                          static_cast<float*>(params.workspace),
                          make_tile_line(params),
                          static_cast<int>(params.heads),
                          params.scale,
                          params.scale * kLog2E,
                          params.own_values_apart};
  const int64_t heads = params.batch * params.heads;
  using Queries = QueryShape<kHeadDim>;
  const cudaError_t error =
      launch(query_kernel<Element, kHeadDim>, ceil_div(args.line.tiles, Queries::kGroups), heads,
             Queries::kThreads, sizeof(QueryShared<kHeadDim>), args, stream);
  if (error != cudaSuccess) return error;
  return launch(key_kernel<Element, kHeadDim>, args.line.tiles, heads, kWarpgroupThreads,
                sizeof(KeyShared<kHeadDim>), args, stream);
}

}  // namespace
}  // namespace tiled::local

cudaError_t local_backward(const ChunkedAttentionBackwardParams& params, cudaStream_t stream) {
  return tiled::dispatch<32, 64, 128>(params, [&](auto element, auto head_dim, auto) {
    return tiled::local::launch_backward<decltype(element), head_dim()>(params, stream);
  });
}

}  // namespace reformer::kernels

// Forward pass of local attention by wgmma: separate keys in natural order, chunks of whole tiles.
//
// A block takes consecutive tiles of queries, one per warpgroup, and walks over the tiles of keys
// and values that their windows cover, which come through a ring in shared memory. Online softmax
// in base 2. The weights stay in registers, as operands of O += P V. (Queries in registers, loaded
// once, were miscompiled: ptxas 13.0 gave their registers to the weights.)
#include "chunked_attention/local/local.cuh"

namespace reformer::kernels {
namespace tiled::local {
namespace {

// By registers: four warpgroups to a multiprocessor with 128 each, or three with 168.
template <int kHeadDim>
struct ForwardShape : Shape<kHeadDim> {
  static constexpr bool kWide = kHeadDim > 64;
  static constexpr int kGroups = kWide ? 3 : 2;          // warpgroups
  static constexpr int kResidentBlocks = kWide ? 1 : 2;  // per multiprocessor
  static constexpr int kThreads = kGroups * kWarpgroupThreads;
  static constexpr int kStages = 4;  // of the ring
};

struct ForwardArgs {
  Rows q, k, v, own_values, out;
  const bool* key_padding_mask;
  float* lse;
  TileLine line;
  int heads;
  float scale_log2;  // scale * log2(e)
};

template <int kHeadDim>
struct ForwardShared {
  static constexpr int kStages = ForwardShape<kHeadDim>::kStages;
  TileBytes<kHeadDim> queries[ForwardShape<kHeadDim>::kGroups];
  TileBytes<kHeadDim> keys[kStages], values[kStages];
  int key_positions[kStages][kTileRows];
};

// Turns scores into weights relative to the largest score so far: packs them as an operand, adds
// them to the thread's part of its rows' sums, and gives the factors for what was summed before.
// peaks: the largest scores, in base 2.
template <typename Element>
__device__ __forceinline__ void exponentiate(Fragments& weights, float (&peaks)[2],
                                             float (&sums)[2], float (&rescale)[2],
                                             const Accumulator& scores, float scale_log2) {
  float shifts[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      maximum = fmaxf(maximum, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
    }
    const float peak = fmaxf(peaks[half], quad_max(maximum) * scale_log2);
    shifts[half] = peak == -INFINITY ? 0.0F : peak;
    rescale[half] = exp2_approx(peaks[half] - shifts[half]);
    peaks[half] = peak;
    sums[half] *= rescale[half];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[e] = exp2_approx(fmaf(scores[j][e], scale_log2, -shifts[e / 2]));
      sums[e / 2] += p[e];
    }
    pack_columns<Element>(weights, j, p[0], p[1], p[2], p[3]);
  }
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(ForwardShape<kHeadDim>::kThreads,
                                  ForwardShape<kHeadDim>::kResidentBlocks)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
#ifdef REFORMER_SM90A
  using Tile = ForwardShape<kHeadDim>;
  constexpr int kGroups = Tile::kGroups, kStages = Tile::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<kHeadDim>*>(shared_bytes);
  const TileLine& line = args.line;

  const int group = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  const uint32_t thread = threadIdx.x % kWarpgroupThreads;
  const int first_tile = blockIdx.x * kGroups, tile = first_tile + group;
  const int head = blockIdx.y, batch = head / args.heads;
  const bool* padding = args.key_padding_mask == nullptr
                            ? nullptr
                            : args.key_padding_mask + int64_t{batch} * line.length;
  const uint8_t* q = args.q.head(batch, head % args.heads);
  const uint8_t* k = args.k.head(batch, head % args.heads);
  const uint8_t* v = args.v.head(batch, head % args.heads);

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
    copy(shared.queries[i], q, args.q.row_bytes, (first_tile + i) * kTileRows);
  }
  copy_async_commit();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_keys(step);
  wait_for_copies_and_sync<kStages - 1>();

  const uint32_t queries = shared_address(shared.queries[group]);
  Output<kHeadDim> output;
  clear(output);
  float peaks[2] = {-INFINITY, -INFINITY}, sums[2] = {0.0F, 0.0F};
  // The first of the thread's two rows; the other is 8 below.
  const int upper_row = tile * kTileRows + static_cast<int>(thread / 32 * 16 + thread % 32 / 4);

  for (int step = 0; step < steps; ++step) {
    wait_for_copies_and_sync<kStages - 2>();
    load_keys(step + kStages - 1);
    const int stage = step % kStages, key_tile = line.fold(begin + step);
    if (padding != nullptr) {
      clear_unused_rows<kHeadDim, Tile::kThreads>(
          shared.values[stage],
          [&](uint32_t row) { return shared.key_positions[stage][row] == kInvalidKey; },
          threadIdx.x);
      __syncthreads();
    }
    if (!own.holds(begin + step) || !line.meet(tile, key_tile)) continue;

    Accumulator scores;
    wgmma_fence();
    multiply_rows<Element, kHeadDim>(scores, tile_descriptor(queries),
                                     tile_descriptor(shared_address(shared.keys[stage])));
    wgmma_wait<0>();
    tiled::pin(scores);
    if (key_tile == tile || key_tile == line.tiles - 1 || padding != nullptr) {
      mask_scores(scores, line, shared.key_positions[stage], upper_row, thread);
    }
    Fragments weights;
    float rescale[2];
    exponentiate<Element>(weights, peaks, sums, rescale, scores, args.scale_log2);
    scale_rows(output, rescale);
    wgmma_fence();
    accumulate_rows<Element, kHeadDim>(output, weights,
                                       tile_descriptor(shared_address(shared.values[stage])));
    wgmma_wait<0>();
    pin(output);
  }
  __syncthreads();  // the memory of the queries takes the result
  if (tile >= line.tiles) return;

  float inverse_sums[2];
  bool has_key[2], self_only[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = upper_row + 8 * half;
    const float sum = quad_sum(sums[half]);
    has_key[half] = sum != 0.0F;  // so is NaN
    inverse_sums[half] = has_key[half] ? __fdividef(1.0F, sum) : 0.0F;
    self_only[half] =
        !has_key[half] && line.mask_self && key_position(padding, row, line.length) != kInvalidKey;
    if (thread % 4 == 0 && row < line.length) {
      constexpr float kLn2 = 0.6931471805599453F;
      const float shift = peaks[half] == -INFINITY ? 0.0F : peaks[half];  // all NaN
      args.lse[int64_t{head} * line.length + row] = has_key[half]
                                                        ? stored_lse((shift + __log2f(sum)) * kLn2)
                                                    : self_only[half] ? kSelfOnlyLse
                                                                      : -INFINITY;
    }
  }
  scale_rows(output, inverse_sums);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (has_key[half]) continue;
    clear_row(output, half);  // no weights, but 0 times what was not finite
    if (!self_only[half]) continue;
    const uint8_t* own_values = args.own_values.head(batch, head % args.heads);
    add_row<Element, kHeadDim>(
        output, half,
        indexed_address<uint8_t>(own_values, upper_row + 8 * half, args.own_values.row_bytes),
        thread);
  }
  store_result<Element, kHeadDim>(output, shared.queries[group],
                                  const_cast<uint8_t*>(args.out.head(batch, head % args.heads)),
                                  args.out.row_bytes, tile * kTileRows, line.length, thread);
#endif
}

template <typename Element, int kHeadDim>
cudaError_t launch_forward(const ChunkedAttentionParams& params, cudaStream_t stream) {
  const ForwardArgs args{Rows(params.q, sizeof(Element)),
                         Rows(params.k, sizeof(Element)),
                         Rows(params.v, sizeof(Element)),
                         Rows(params.own_values, sizeof(Element)),
                         Rows(params.out, sizeof(Element)),
                         params.key_padding_mask,
                         params.lse,
                         make_tile_line(params),
                         static_cast<int>(params.heads),
                         params.scale * kLog2E};
  const auto kernel = forward_kernel<Element, kHeadDim>;
  constexpr int kSharedBytes = sizeof(ForwardShared<kHeadDim>);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  using Tile = ForwardShape<kHeadDim>;
  const dim3 grid(ceil_div(args.line.tiles, Tile::kGroups),
                  static_cast<unsigned>(params.batch * params.heads));
  kernel<<<grid, Tile::kThreads, kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace tiled::local

cudaError_t local_forward(const ChunkedAttentionParams& params, cudaStream_t stream) {
  return tiled::dispatch<32, 64, 128>(params, [&](auto element, auto head_dim, auto) {
    return tiled::local::launch_forward<decltype(element), head_dim()>(params, stream);
  });
}

}  // namespace reformer::kernels

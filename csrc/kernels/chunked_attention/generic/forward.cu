// Chunked attention forward for any shape and flag: one block per tile of sorted queries walks over
// the keys of their windows with an online softmax, and writes one normalised row per (round,
// query).
#include "chunked_attention/generic/generic.cuh"

namespace reformer::kernels {
namespace generic {
namespace {

// Tile sizes by bytes per row: 4 blocks per multiprocessor up to 256 bytes on sm_80 and sm_90, and
// at most the 99 KiB of shared memory that the small chips have.
template <typename T, int kHeadDim>
struct ForwardTile {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kRows = kRowBytes <= 512 ? 64 : 32;
  static constexpr int kColumns = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kSegment = 4 * kColumns;  // keys listed at a time
  static constexpr int kStride = kHeadDim + 16 / static_cast<int>(sizeof(T));
  static constexpr int kThreads = 2 * kRows;
  static constexpr int kBlocks = kRowBytes <= 128   ? 4
                                 : kRowBytes <= 256 ? 3
                                                    : 2;  // per multiprocessor

  struct alignas(16) Shared {
    T q[kRows * kStride];
    T k[2][kColumns * kStride];  // one tile in use, one on its way
    T v[2][kColumns * kStride];
    Key keys[kSegment];
    int tokens[kRows];
    Sequence<T> sequence;
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardTile<T, kHeadDim>::kThreads,
                                  ForwardTile<T, kHeadDim>::kBlocks)
    forward_kernel(const __grid_constant__ ChunkedAttentionParams params,
                   const __grid_constant__ ForwardStage stage, const __grid_constant__ Line line) {
  using Tile = ForwardTile<T, kHeadDim>;
  constexpr int kColumns = Tile::kColumns, kStride = Tile::kStride, kThreads = Tile::kThreads;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
  const int head_dim = static_cast<int>(params.head_dim);

  const Rows rows(line, Tile::kRows);
  const Columns columns(line, rows, line.look_back, line.look_ahead);
  const Sequence<T>& sequence = shared.sequence;
  if (threadIdx.x == 0) {
    const float* scales = stage.key_scale;
    if (scales != nullptr) scales += static_cast<int64_t>(rows.head) * line.length;
    shared.sequence =
        Sequence<T>(params, line, stage.head_begin, rows.head, stage.chunk_numbers, scales, 1);
  }
  __syncthreads();

  if (threadIdx.x < Tile::kRows) {
    const int slot = rows.begin + threadIdx.x;
    shared.tokens[threadIdx.x] = slot < rows.end ? sequence.token_at(slot) : -1;
  }
  __syncthreads();
  const auto row_token = [&](int row) { return shared.tokens[row]; };
  gather_rows<T, Tile::kRows, kHeadDim, kStride, kThreads>(shared.q, sequence.q, sequence.stride_q,
                                                           head_dim, row_token);

  // The lane's two rows of the warp's 16.
  const int warp_row = threadIdx.x / 32 * 16, group = threadIdx.x % 32 / 4;
  T* const q_slab = shared.q + warp_row * kStride;
  Query queries[2];
  Window windows[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int slot = rows.begin + warp_row + group + 8 * row;
    queries[row] = {};
    queries[row].token = -1;
    windows[row] = {0, columns.count};
    if (slot >= rows.end) continue;
    queries[row] = sequence.query_at(slot, rows.round);
    if (columns.same_for_all_rows) continue;
    const Span window = line.window(slot, columns.before, columns.after);
    windows[row] = {window.begin - columns.begin, window.end - window.begin};
  }

  const auto gather_keys = [&](int first, int buffer) {
    const auto token_of = [&](int column) { return shared.keys[first + column].token; };
    gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(shared.k[buffer], sequence.k,
                                                          sequence.stride_k, head_dim, token_of);
    gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(shared.v[buffer], sequence.v,
                                                          sequence.stride_v, head_dim, token_of);
  };

  float out[kHeadDim / 8][4];
  float row_max[2], row_sum[2];
  for (bool careful = false;; careful = true) {
    for_each(out, [](float& value, int, int) { value = 0; });
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0;

    for (int segment = 0; segment < columns.count; segment += Tile::kSegment) {
      const int listed = min(columns.count - segment, Tile::kSegment);
      for (int column = threadIdx.x; column < Tile::kSegment; column += kThreads) {
        shared.keys[column] = {-1, 0, 0, false};
        if (column < listed) {
          shared.keys[column] =
              sequence.key_at(line.fold(columns.begin + segment + column), rows.round);
        }
      }
      __syncthreads();
      gather_keys(0, 0);

      for (int first = 0, buffer = 0; first < listed; first += kColumns, buffer ^= 1) {
        wait_for_copies();
        __syncthreads();
        if (first + kColumns < listed) gather_keys(first + kColumns, buffer ^ 1);
        Key* const keys = shared.keys + first;
        if (careful) {
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(shared.k[buffer], keys);
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(shared.v[buffer], keys);
          __syncthreads();
        }

        float weights[kColumns / 8][4] = {};
        multiply_transposed<T, kHeadDim, kColumns>(weights, q_slab, shared.k[buffer], kStride);
        logits_of(
            weights, sequence, [&](int row, int) -> const Query& { return queries[row]; },
            [&](int, int column) -> const Key& { return keys[column]; }, !columns.same_for_all_rows,
            windows, segment + first, careful);

        float tile_max[2] = {-INFINITY, -INFINITY};
        for_each(weights, [&](float& weight, int row, int) {
          tile_max[row] = fmaxf(tile_max[row], weight);
        });
        float shift[2], rescale[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          tile_max[row] = fmaxf(tile_max[row], __shfl_xor_sync(0xffffffffU, tile_max[row], 1));
          tile_max[row] = fmaxf(tile_max[row], __shfl_xor_sync(0xffffffffU, tile_max[row], 2));
          const float new_max = fmaxf(row_max[row], tile_max[row]);
          shift[row] = new_max == -INFINITY ? 0 : new_max;
          rescale[row] = exp2_approx(row_max[row] - shift[row]);
          row_max[row] = new_max;
          row_sum[row] *= rescale[row];
        }
        for_each(weights, [&](float& weight, int row, int) {
          weight = exp2_approx(weight - shift[row]);
          row_sum[row] += weight;
        });
        if (sequence.dropout_threshold != 0) {
          for_each(weights, [&](float& weight, int row, int column) {
            weight *= sequence.dropout_factor(queries[row], keys[column]);
          });
        }
        for_each(out, [&](float& value, int row, int) { value *= rescale[row]; });
        multiply<T, kColumns, kHeadDim>(out, weights, shared.v[buffer], kStride);
      }
      __syncthreads();  // the keys of the next segment replace these
    }
    if (careful || !__syncthreads_or(any_non_finite(out))) break;
  }

  const int64_t first_row =
      (static_cast<int64_t>(rows.head) * line.rounds + rows.round) * line.length;
  float inverse_sum[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    row_sum[row] += __shfl_xor_sync(0xffffffffU, row_sum[row], 1);
    row_sum[row] += __shfl_xor_sync(0xffffffffU, row_sum[row], 2);
    inverse_sum[row] = row_sum[row] == 0 ? 0 : 1 / row_sum[row];
    if (threadIdx.x % 4 == 0 && queries[row].token >= 0) {
      stage.partial_lse[first_row + queries[row].token] = row_max[row] + log2f(row_sum[row]);
    }
  }
  for_each(out, [&](float& value, int row, int) { value *= inverse_sum[row]; });
  scatter_rows(out, q_slab, kStride, static_cast<T*>(stage.partial_out) + first_row * head_dim,
               head_dim, 0, shared.tokens + warp_row);
}

}  // namespace
}  // namespace generic

cudaError_t generic_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                            cudaStream_t stream) {
  using namespace generic;
  return dispatch(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Tile = ForwardTile<T, kHeadDim>;
    const Line line = make_line(params);
    const auto blocks = static_cast<unsigned>(row_tiles(line, stage.head_count, Tile::kRows));
    return launch_kernel(&forward_kernel<T, kHeadDim>, dim3(blocks), Tile::kThreads,
                         sizeof(typename Tile::Shared), stream, params, stage, line);
  });
}

}  // namespace reformer::kernels

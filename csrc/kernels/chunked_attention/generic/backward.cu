// Chunked attention backward for any shape and flag, from the final lse. Two kernels, so that
// nothing is added by atomics: query_kernel takes tiles of queries and walks over their keys for
// dq; key_kernel takes tiles of keys and walks over the queries that see them for dk and dv. Each
// writes one row per (round, position).
//
//   p_ij = exp(s_ij - lse_i),  ds_ij = p_ij (d_ij dout_i . v_j - delta_i),  d_ij the dropout factor
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij d_ij dout_i
#include "chunked_attention/generic/generic.cuh"

namespace reformer::kernels {
namespace generic {
namespace {

// Two resident and two streamed tiles; sizes as in the forward pass.
template <typename T, int kHeadDim, typename Column>
struct BackwardTile {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kRows = kRowBytes <= 512 ? 64 : 32;
  static constexpr int kColumns = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kBuffers = kRowBytes <= 256 ? 2 : 1;
  static constexpr int kSegment = kRowBytes <= 512 ? 4 * kColumns : 2 * kColumns;
  static constexpr int kStride = kHeadDim + 16 / static_cast<int>(sizeof(T));
  static constexpr int kThreads = 2 * kRows;
  static constexpr int kBlocks = kRowBytes <= 128 ? 3 : 2;  // per multiprocessor

  struct alignas(16) Shared {
    T row_a[kRows * kStride], row_b[kRows * kStride];
    T column_a[kBuffers][kColumns * kStride], column_b[kBuffers][kColumns * kStride];
    Column columns[kSegment];
    int tokens[kRows];
    Sequence<T> sequence;
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

template <typename T, int kHeadDim>
using QueryTile = BackwardTile<T, kHeadDim, Key>;
template <typename T, int kHeadDim>
struct KeyTile : BackwardTile<T, kHeadDim, Query> {
  // Columns of dk and dv that a block accumulates: both sums of 256 do not fit its registers.
  static constexpr int kSlice = kHeadDim < 128 ? kHeadDim : 128;
};

// The buffers in which one tile is used while the next one arrives; with a single buffer, the next
// is asked for only when all have used the one there is.
template <class Tile, class Gather, class Use>
__device__ __forceinline__ void stream_tiles(int count, Gather gather, Use use) {
  gather(0, 0);
  for (int first = 0, buffer = 0; first < count; first += Tile::kColumns) {
    const bool more = first + Tile::kColumns < count;
    const int next_buffer = Tile::kBuffers == 2 ? buffer ^ 1 : 0;
    wait_for_copies();
    __syncthreads();
    if (Tile::kBuffers == 2 && more) gather(first + Tile::kColumns, next_buffer);
    use(first, buffer);
    if (Tile::kBuffers == 1 && more) {
      __syncthreads();
      gather(first + Tile::kColumns, next_buffer);
    }
    buffer = next_buffer;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(QueryTile<T, kHeadDim>::kThreads, QueryTile<T, kHeadDim>::kBlocks)
    query_kernel(const __grid_constant__ ChunkedAttentionBackwardParams params,
                 const __grid_constant__ BackwardStage stage, const __grid_constant__ Line line) {
  using Tile = QueryTile<T, kHeadDim>;
  constexpr int kColumns = Tile::kColumns, kStride = Tile::kStride, kThreads = Tile::kThreads;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
  const int head_dim = static_cast<int>(params.head_dim);

  const Rows rows(line, Tile::kRows);
  const Columns columns(line, rows, line.look_back, line.look_ahead);
  const RowStats* const stats = stage.row_stats + static_cast<int64_t>(rows.head) * line.length;
  const Sequence<T>& sequence = shared.sequence;
  if (threadIdx.x == 0) {
    shared.sequence = Sequence<T>(params, line, stage.head_begin, rows.head, stage.chunk_numbers,
                                  &stats->key_scale, sizeof(RowStats) / sizeof(float));
  }
  __syncthreads();
  const T* const grad_out = sequence.rows_of(params.grad_out);

  if (threadIdx.x < Tile::kRows) {
    const int slot = rows.begin + threadIdx.x;
    shared.tokens[threadIdx.x] = slot < rows.end ? sequence.token_at(slot) : -1;
  }
  __syncthreads();
  const auto row_token = [&](int row) { return shared.tokens[row]; };
  gather_rows<T, Tile::kRows, kHeadDim, kStride, kThreads>(shared.row_a, sequence.q,
                                                           sequence.stride_q, head_dim, row_token);
  gather_rows<T, Tile::kRows, kHeadDim, kStride, kThreads>(
      shared.row_b, grad_out, params.grad_out.stride_l, head_dim, row_token);

  const int warp_row = threadIdx.x / 32 * 16, group = threadIdx.x % 32 / 4;
  T* const q_slab = shared.row_a + warp_row * kStride;
  const T* const grad_out_slab = shared.row_b + warp_row * kStride;
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
    queries[row].lse = stats[queries[row].token].lse;
    queries[row].delta = stats[queries[row].token].delta;
    if (columns.same_for_all_rows) continue;
    const Span window = line.window(slot, columns.before, columns.after);
    windows[row] = {window.begin - columns.begin, window.end - window.begin};
  }

  float grad_q[kHeadDim / 8][4];
  for (bool careful = false;; careful = true) {
    for_each(grad_q, [](float& value, int, int) { value = 0; });

    for (int segment = 0; segment < columns.count; segment += Tile::kSegment) {
      const int listed = min(columns.count - segment, Tile::kSegment);
      for (int column = threadIdx.x; column < Tile::kSegment; column += kThreads) {
        shared.columns[column] = {-1, 0, 0, false};
        if (column < listed) {
          shared.columns[column] =
              sequence.key_at(line.fold(columns.begin + segment + column), rows.round);
        }
      }
      __syncthreads();

      const auto gather = [&](int first, int buffer) {
        const auto token_of = [&](int column) { return shared.columns[first + column].token; };
        gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(
            shared.column_a[buffer], sequence.k, sequence.stride_k, head_dim, token_of);
        gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(
            shared.column_b[buffer], sequence.v, sequence.stride_v, head_dim, token_of);
      };
      stream_tiles<Tile>(listed, gather, [&](int first, int buffer) {
        Key* const keys = shared.columns + first;
        T* const k_tile = shared.column_a[buffer];
        T* const v_tile = shared.column_b[buffer];
        if (careful) {
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(k_tile, keys);
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(v_tile, keys);
          __syncthreads();
        }

        float scores[kColumns / 8][4] = {};
        multiply_transposed<T, kHeadDim, kColumns>(scores, q_slab, k_tile, kStride);
        logits_of(
            scores, sequence, [&](int row, int) -> const Query& { return queries[row]; },
            [&](int, int column) -> const Key& { return keys[column]; }, !columns.same_for_all_rows,
            windows, segment + first, careful);

        float grad_scores[kColumns / 8][4] = {};
        multiply_transposed<T, kHeadDim, kColumns>(grad_scores, grad_out_slab, v_tile, kStride);
        if (sequence.dropout_threshold != 0) {
          for_each(grad_scores, [&](float& grad, int row, int column) {
            grad *= sequence.dropout_factor(queries[row], keys[column]);
          });
        }
#pragma unroll
        for (int tile = 0; tile < kColumns / 8; ++tile) {
#pragma unroll
          for (int element = 0; element < 4; ++element) {
            const Query& query = queries[element / 2];
            const Key& key = keys[tile * 8 + threadIdx.x % 4 * 2 + element % 2];
            float& grad = grad_scores[tile][element];
            const float score = scores[tile][element];
            grad = score == -INFINITY || query.lse == INFINITY
                       ? 0
                       : weight_of(score, query.lse) * (grad - query.delta) * key.scale;
          }
        }
        multiply<T, kColumns, kHeadDim>(grad_q, grad_scores, k_tile, kStride);
      });
      __syncthreads();  // the keys of the next segment replace these
    }
    if (careful || !__syncthreads_or(any_non_finite(grad_q))) break;
  }

  for_each(grad_q, [&](float& value, int, int) { value *= params.scale; });
  const int64_t first_row =
      (static_cast<int64_t>(rows.head) * line.rounds + rows.round) * line.length;
  scatter_rows(grad_q, q_slab, kStride, static_cast<T*>(stage.partial_q) + first_row * head_dim,
               head_dim, 0, shared.tokens + warp_row);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(KeyTile<T, kHeadDim>::kThreads, KeyTile<T, kHeadDim>::kBlocks)
    key_kernel(const __grid_constant__ ChunkedAttentionBackwardParams params,
               const __grid_constant__ BackwardStage stage, const __grid_constant__ Line line) {
  using Tile = KeyTile<T, kHeadDim>;
  constexpr int kColumns = Tile::kColumns, kStride = Tile::kStride, kThreads = Tile::kThreads;
  constexpr int kSlice = Tile::kSlice;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
  const int head_dim = static_cast<int>(params.head_dim);
  const int first_column = blockIdx.y * kSlice;

  const Rows rows(line, Tile::kRows);
  // The queries that see a chunk's keys are those of the inverse window.
  const Columns columns(line, rows, line.look_ahead, line.look_back);
  const RowStats* const stats = stage.row_stats + static_cast<int64_t>(rows.head) * line.length;
  const Sequence<T>& sequence = shared.sequence;
  if (threadIdx.x == 0) {
    shared.sequence = Sequence<T>(params, line, stage.head_begin, rows.head, stage.chunk_numbers,
                                  &stats->key_scale, sizeof(RowStats) / sizeof(float));
  }
  __syncthreads();
  const T* const grad_out = sequence.rows_of(params.grad_out);

  if (threadIdx.x < Tile::kRows) {
    const int slot = rows.begin + threadIdx.x;
    shared.tokens[threadIdx.x] = slot < rows.end ? sequence.token_at(slot) : -1;
  }
  __syncthreads();
  const auto row_token = [&](int row) { return shared.tokens[row]; };
  gather_rows<T, Tile::kRows, kHeadDim, kStride, kThreads>(shared.row_a, sequence.k,
                                                           sequence.stride_k, head_dim, row_token);
  gather_rows<T, Tile::kRows, kHeadDim, kStride, kThreads>(shared.row_b, sequence.v,
                                                           sequence.stride_v, head_dim, row_token);

  const int warp_row = threadIdx.x / 32 * 16, group = threadIdx.x % 32 / 4;
  T* const k_slab = shared.row_a + warp_row * kStride;
  T* const v_slab = shared.row_b + warp_row * kStride;
  Key keys[2];
  Window windows[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int slot = rows.begin + warp_row + group + 8 * row;
    keys[row] = {-1, 0, 0, false};
    windows[row] = {0, columns.count};
    if (slot >= rows.end) continue;
    keys[row] = sequence.key_at(slot, rows.round);
    if (columns.same_for_all_rows) continue;
    const Span window = line.window(slot, columns.before, columns.after);
    windows[row] = {window.begin - columns.begin, window.end - window.begin};
  }

  float grad_k[kSlice / 8][4], grad_v[kSlice / 8][4];
  for (bool careful = false;; careful = true) {
    for_each(grad_k, [](float& value, int, int) { value = 0; });
    for_each(grad_v, [](float& value, int, int) { value = 0; });

    for (int segment = 0; segment < columns.count; segment += Tile::kSegment) {
      const int listed = min(columns.count - segment, Tile::kSegment);
      for (int column = threadIdx.x; column < Tile::kSegment; column += kThreads) {
        Query query = {};
        query.token = -1;
        if (column < listed) {
          query = sequence.query_at(line.fold(columns.begin + segment + column), rows.round);
          query.lse = stats[query.token].lse;
          query.delta = stats[query.token].delta;
        }
        shared.columns[column] = query;
      }
      __syncthreads();

      const auto gather = [&](int first, int buffer) {
        const auto token_of = [&](int column) { return shared.columns[first + column].token; };
        gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(
            shared.column_a[buffer], sequence.q, sequence.stride_q, head_dim, token_of);
        gather_rows<T, kColumns, kHeadDim, kStride, kThreads>(
            shared.column_b[buffer], grad_out, params.grad_out.stride_l, head_dim, token_of);
      };
      stream_tiles<Tile>(listed, gather, [&](int first, int buffer) {
        Query* const queries = shared.columns + first;
        T* const q_tile = shared.column_a[buffer];
        T* const grad_out_tile = shared.column_b[buffer];
        if (careful) {
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(q_tile, queries);
          isolate_non_finite<T, kColumns, kHeadDim, kStride, kThreads>(grad_out_tile, queries);
          __syncthreads();
        }

        float weights[kColumns / 8][4] = {};
        multiply_transposed<T, kHeadDim, kColumns>(weights, k_slab, q_tile, kStride);
        logits_of(
            weights, sequence, [&](int, int column) -> const Query& { return queries[column]; },
            [&](int row, int) -> const Key& { return keys[row]; }, !columns.same_for_all_rows,
            windows, segment + first, careful);

        float grad_scores[kColumns / 8][4] = {};
        multiply_transposed<T, kHeadDim, kColumns>(grad_scores, v_slab, grad_out_tile, kStride);
#pragma unroll
        for (int tile = 0; tile < kColumns / 8; ++tile) {
#pragma unroll
          for (int element = 0; element < 4; ++element) {
            const Query& query = queries[tile * 8 + threadIdx.x % 4 * 2 + element % 2];
            float& weight = weights[tile][element];
            float& grad = grad_scores[tile][element];
            const bool attends = weight != -INFINITY;
            const float factor = sequence.dropout_threshold != 0
                                     ? sequence.dropout_factor(query, keys[element / 2])
                                     : 1.0f;
            weight = attends ? weight_of(weight, query.lse) : 0;
            grad = attends ? weight * (grad * factor - query.delta) : 0;
            weight *= factor;
          }
        }
        multiply<T, kColumns, kSlice>(grad_v, weights, grad_out_tile + first_column, kStride);
        multiply<T, kColumns, kSlice>(grad_k, grad_scores, q_tile + first_column, kStride);
      });
      __syncthreads();  // the queries of the next segment replace these
    }
    if (careful || !__syncthreads_or(any_non_finite(grad_k) || any_non_finite(grad_v))) break;
  }

  for_each(grad_k, [&](float& value, int, int) { value *= params.scale; });
  const int64_t first_row =
      (static_cast<int64_t>(rows.head) * line.rounds + rows.round) * line.length;
  const int* const tokens = shared.tokens + warp_row;
  scatter_rows(grad_k, k_slab, kStride, static_cast<T*>(stage.partial_k) + first_row * head_dim,
               head_dim, first_column, tokens);
  scatter_rows(grad_v, v_slab, kStride, static_cast<T*>(stage.partial_v) + first_row * head_dim,
               head_dim, first_column, tokens);
}

}  // namespace
}  // namespace generic

cudaError_t generic_backward(const ChunkedAttentionBackwardParams& params,
                             const BackwardStage& stage, cudaStream_t stream) {
  using namespace generic;
  return dispatch(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Queries = QueryTile<T, kHeadDim>;
    using Keys = KeyTile<T, kHeadDim>;
    const Line line = make_line(params);
    const auto query_blocks =
        static_cast<unsigned>(row_tiles(line, stage.head_count, Queries::kRows));
    const cudaError_t error =
        launch_kernel(&query_kernel<T, kHeadDim>, dim3(query_blocks), Queries::kThreads,
                      sizeof(typename Queries::Shared), stream, params, stage, line);
    if (error != cudaSuccess) return error;
    const auto key_blocks = static_cast<unsigned>(row_tiles(line, stage.head_count, Keys::kRows));
    return launch_kernel(&key_kernel<T, kHeadDim>, dim3(key_blocks, kHeadDim / Keys::kSlice),
                         Keys::kThreads, sizeof(typename Keys::Shared), stream, params, stage,
                         line);
  });
}

}  // namespace reformer::kernels

// Which kernel attends, in groups of how many heads, with what workspace. No CUDA here: the same
// for the kernels and for reformer_ext.plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "chunked_attention/params.h"
#include "chunked_attention/stage.h"
#include "common/device.h"

namespace reformer::kernels {

// generic/: any shape and flag. tiled/: shared QK in chunks of 64 with one before them, half
// precision, by wgmma or by mma.sync. local/: local attention by wgmma.
enum class AttentionKernel { generic, wgmma, mma_sync, local };

struct AttentionPlan {
  AttentionKernel kernel;
  int64_t head_group;  // heads worked on together: they share the workspace
  int64_t workspace;   // bytes
};

inline const char* name_of(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::generic:
      return "generic";
    case AttentionKernel::wgmma:
      return "wgmma";
    case AttentionKernel::mma_sync:
      return "mma_sync";
    case AttentionKernel::local:
      return "local";
  }
  return "";
}

inline constexpr int64_t kTiledChunk = 64;            // rows of a tile
inline constexpr int kMmaSyncBackwardShared = 84224;  // bytes of a block of its backward kernel
inline constexpr int64_t kLargestRowStride = int64_t{1} << 28;  // row_bytes is an int

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool is_shared_qk(const ChunkedAttentionParams& params) { return params.k.data == nullptr; }

// The main kernels count slots of the line, and positions, in 32 bits.
inline bool attention_is_valid(const ChunkedAttentionParams& params) {
  return params.batch > 0 && params.heads > 0 && params.length > 0 && params.rounds > 0 &&
         params.head_dim > 0 && params.head_dim <= 256 && params.head_dim % 8 == 0 &&
         params.chunk_size > 0 && params.look_back >= 0 && params.look_ahead >= 0 &&
         params.length <= (int64_t{1} << 30) / params.rounds &&
         (params.rounds == 1 || params.order != nullptr);
}

// has_wgmma: the build has wgmma code for the device.
inline bool wgmma_runs(const DeviceTraits& traits, bool has_wgmma) {
  return traits.major == 9 && traits.minor == 0 && has_wgmma;
}

inline bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

// Whether the algorithm does, for these head dims.
template <int... kHeadDims>
bool tiled_suits(const ChunkedAttentionParams& params) {
  const bool sizes = ((params.head_dim == kHeadDims) || ...) && params.chunk_size == kTiledChunk &&
                     params.look_back == 1 && params.look_ahead == 0 &&
                     params.length < (int64_t{1} << 30) &&
                     params.rounds * (params.length / kTiledChunk + 1) < (int64_t{1} << 30) &&
                     params.batch * params.heads < (int64_t{1} << 16);
  const bool flags =
      is_half(params.dtype) && params.k.data == nullptr && params.scale > 0.0F &&
      !(corrects_duplicates(params) && (params.buckets != nullptr || params.dropout_p > 0));
  const bool strides =
      params.q.stride_l <= kLargestRowStride && params.v.stride_l <= kLargestRowStride;
  // Wrapping a line of one chunk would count that chunk twice.
  const bool twice = params.wrap && params.rounds == 1 && params.length <= params.chunk_size;
  return sizes && flags && strides && !twice;
}

inline bool wgmma_suits(const ChunkedAttentionParams& params, const DeviceTraits& traits,
                        bool has_wgmma) {
  return tiled_suits<32, 64, 128>(params) && wgmma_runs(traits, has_wgmma);
}

inline bool mma_sync_suits(const ChunkedAttentionParams& params, const DeviceTraits& traits) {
  return tiled_suits<32, 64>(params) && traits.major >= 8 &&
         traits.shared_memory >= kMmaSyncBackwardShared;
}

inline bool local_suits(const ChunkedAttentionParams& params, const DeviceTraits& traits,
                        bool has_wgmma) {
  const bool sizes = (params.head_dim == 32 || params.head_dim == 64 || params.head_dim == 128) &&
                     (params.chunk_size % kTiledChunk == 0 || params.chunk_size >= params.length) &&
                     params.length < (int64_t{1} << 30) &&
                     params.batch * params.heads < (int64_t{1} << 16);
  const bool flags = is_half(params.dtype) && params.k.data != nullptr && params.order == nullptr &&
                     params.buckets == nullptr && params.dropout_p == 0.0F && params.scale > 0.0F;
  const bool strides =
      params.q.stride_l <= kLargestRowStride && params.k.stride_l <= kLargestRowStride &&
      params.v.stride_l <= kLargestRowStride && params.own_values.stride_l <= kLargestRowStride;
  return sizes && flags && strides && wgmma_runs(traits, has_wgmma);
}

inline AttentionKernel choose_attention(const ChunkedAttentionParams& params,
                                        const DeviceTraits& traits, bool has_wgmma) {
  if (local_suits(params, traits, has_wgmma)) return AttentionKernel::local;
  if (wgmma_suits(params, traits, has_wgmma)) return AttentionKernel::wgmma;
  if (mma_sync_suits(params, traits)) return AttentionKernel::mma_sync;
  return AttentionKernel::generic;
}

inline int64_t pair_bits_size(const ChunkedAttentionParams& params, int64_t head_count) {
  const int64_t word = params.dropout_p > 0 ? sizeof(PairBits) : sizeof(uint32_t);
  const int64_t chunks = params.rounds * ceil_div(params.length, kTiledChunk);
  return head_count * chunks * 2 * kPairThreads * word;
}

// Hands out the arrays of a workspace one after the other; without one it only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count, int64_t size = sizeof(T)) {
    char* const array = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (count * size + 255) / 256 * 256;
    return reinterpret_cast<T*>(array);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

struct ForwardWorkspace {
  ForwardStage stage = {};
  float* key_scale = nullptr;
  int32_t* chunk_numbers = nullptr;
  void* pair_bits = nullptr;
  int64_t bytes;

  ForwardWorkspace(const ChunkedAttentionParams& params, int64_t heads, AttentionKernel kernel,
                   void* base) {
    const bool generic = kernel == AttentionKernel::generic;
    Arena arena(base);
    const int64_t positions = heads * params.length, rows = positions * params.rounds;
    stage.partial_out = arena.take<void>(rows * params.head_dim, element_size(params.dtype));
    stage.partial_lse = arena.take<float>(rows);
    if (is_shared_qk(params) && generic) stage.key_scale = key_scale = arena.take<float>(positions);
    if (corrects_duplicates(params))
      stage.chunk_numbers = chunk_numbers = arena.take<int32_t>(rows);
    if (!generic && needs_pair_bits(params))
      stage.pair_bits = pair_bits = arena.take<void>(pair_bits_size(params, heads), 1);
    bytes = arena.bytes();
  }
};

struct BackwardWorkspace {
  BackwardStage stage = {};
  int32_t* chunk_numbers = nullptr;
  void* pair_bits = nullptr;
  int64_t bytes;

  BackwardWorkspace(const ChunkedAttentionBackwardParams& params, int64_t heads,
                    AttentionKernel kernel, void* base) {
    const bool generic = kernel == AttentionKernel::generic;
    Arena arena(base);
    const int64_t positions = heads * params.length, rows = positions * params.rounds;
    const auto take_partial = [&] {
      return arena.take<void>(rows * params.head_dim, element_size(params.dtype));
    };
    if (generic) stage.row_stats = arena.take<RowStats>(positions);
    stage.partial_q = take_partial();
    if (!is_shared_qk(params) || generic) stage.partial_k = take_partial();
    stage.partial_v = take_partial();
    if (corrects_duplicates(params))
      stage.chunk_numbers = chunk_numbers = arena.take<int32_t>(rows);
    if (!generic && needs_pair_bits(params))
      stage.pair_bits = pair_bits = arena.take<void>(pair_bits_size(params, heads), 1);
    bytes = arena.bytes();
  }
};

inline int64_t heads_per_group(const ChunkedAttentionParams& params, int64_t bytes_per_head) {
  constexpr int64_t kLargestGrid = 65535;  // heads are blockIdx.y
  return std::min({std::max<int64_t>(params.workspace_cap / bytes_per_head, 1),
                   params.batch * params.heads, kLargestGrid});
}

inline AttentionPlan plan_chunked_attention(const ChunkedAttentionParams& params,
                                            const DeviceTraits& traits, bool has_wgmma) {
  if (!attention_is_valid(params)) return {AttentionKernel::generic, 0, 0};
  const AttentionKernel kernel = choose_attention(params, traits, has_wgmma);
  if (kernel == AttentionKernel::local) return {kernel, params.batch * params.heads, 0};
  const auto bytes = [&](int64_t heads) {
    return ForwardWorkspace(params, heads, kernel, nullptr).bytes;
  };
  const int64_t group = heads_per_group(params, bytes(1));
  return {kernel, group, bytes(group)};
}

inline AttentionPlan plan_chunked_attention(const ChunkedAttentionBackwardParams& params,
                                            const DeviceTraits& traits, bool has_wgmma) {
  if (!attention_is_valid(params)) return {AttentionKernel::generic, 0, 0};
  const AttentionKernel kernel = choose_attention(params, traits, has_wgmma);
  if (kernel == AttentionKernel::local) {  // delta and the row's lse
    const int64_t heads = params.batch * params.heads;
    const int64_t positions = heads * round_up<int64_t>(params.length, kTiledChunk);
    return {kernel, heads, 2 * positions * static_cast<int64_t>(sizeof(float))};
  }
  const auto bytes = [&](int64_t heads) {
    return BackwardWorkspace(params, heads, kernel, nullptr).bytes;
  };
  const int64_t group = heads_per_group(params, bytes(1));
  return {kernel, group, bytes(group)};
}

}  // namespace reformer::kernels

// Where the wgmma and mma.sync instances of chunked attention apply.
#include "chunked_attention/tiled/backward.cuh"
#include "tensor_core/mma_tile.cuh"

namespace reformer::kernels {
namespace tiled {
namespace {

// Says whether this build's code for the current device has wgmma: see has_body.
#ifdef REFORMER_SM90A
constexpr int kProbeThreads = kThreads;
#else
constexpr int kProbeThreads = 32;
#endif
__global__ __launch_bounds__(kProbeThreads) void wgmma_probe() {}

bool has_wgmma() {
  DeviceTraits traits{};
  return current_device_traits(&traits) == cudaSuccess && traits.major == 9 && traits.minor == 0 &&
         has_body<wgmma_probe>();
}

bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

// Whether the algorithm does, for these head dims.
template <int... kHeadDims>
bool suits(const ChunkedAttentionParams& params) {
  const bool sizes = ((params.head_dim == kHeadDims) || ...) && params.chunk_size == kTileRows &&
                     params.look_back == 1 && params.look_ahead == 0 &&
                     params.length < (int64_t{1} << 30) &&
                     params.rounds * (params.length / kTileRows + 1) < (int64_t{1} << 30) &&
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

}  // namespace
}  // namespace tiled

bool wgmma_supports(const ChunkedAttentionParams& params) {
  return tiled::suits<32, 64, 128>(params) && tiled::has_wgmma();
}

bool mma_sync_supports(const ChunkedAttentionParams& params) {
  using Shared = tiled::BackwardShared<tiled::MmaSync<__half>>;
  DeviceTraits traits{};
  return tiled::suits<32, 64>(params) && current_device_traits(&traits) == cudaSuccess &&
         traits.major >= 8 && traits.shared_memory >= static_cast<int>(sizeof(Shared));
}

bool local_supports(const ChunkedAttentionParams& params) {
  const bool sizes =
      (params.head_dim == 32 || params.head_dim == 64 || params.head_dim == 128) &&
      (params.chunk_size % tiled::kTileRows == 0 || params.chunk_size >= params.length) &&
      params.length < (int64_t{1} << 30) && params.batch * params.heads < (int64_t{1} << 16);
  const bool flags = tiled::is_half(params.dtype) && params.k.data != nullptr &&
                     params.order == nullptr && params.buckets == nullptr &&
                     params.dropout_p == 0.0F && params.scale > 0.0F;
  const bool strides = params.q.stride_l <= tiled::kLargestRowStride &&
                       params.k.stride_l <= tiled::kLargestRowStride &&
                       params.v.stride_l <= tiled::kLargestRowStride &&
                       params.own_values.stride_l <= tiled::kLargestRowStride;
  return sizes && flags && strides && tiled::has_wgmma();
}

}  // namespace reformer::kernels

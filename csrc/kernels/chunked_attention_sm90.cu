// Where the wgmma instances of chunked attention apply.
#include "chunked_attention_sm90.cuh"

namespace reformer::kernels {
namespace sm90 {
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

}  // namespace
}  // namespace sm90

bool sm90_supports(const ChunkedAttentionParams& params) {
  const int64_t dim = params.head_dim;
  const bool sizes = (dim == 32 || dim == 64 || dim == 128) && params.chunk_size == 64 &&
                     params.look_back == 1 && params.look_ahead == 0 &&
                     params.length < (int64_t{1} << 30) &&
                     params.rounds * (params.length / 64 + 1) < (int64_t{1} << 30) &&
                     params.batch * params.heads < (int64_t{1} << 16);
  const bool flags =
      sm90::is_half(params.dtype) && params.k.data == nullptr && params.scale > 0.0F &&
      !(corrects_duplicates(params) && (params.buckets != nullptr || params.dropout_p > 0));
  const bool strides =
      params.q.stride_l <= sm90::kLargestRowStride && params.v.stride_l <= sm90::kLargestRowStride;
  if (!sizes || !flags || !strides) return false;
  // Wrapping a line of one chunk would count that chunk twice.
  if (params.wrap && params.rounds == 1 && params.length <= params.chunk_size) return false;
  return sm90::has_wgmma();
}

bool local_sm90_supports(const ChunkedAttentionParams& params) {
  const bool sizes =
      (params.head_dim == 32 || params.head_dim == 64 || params.head_dim == 128) &&
      (params.chunk_size % sm90::kTileRows == 0 || params.chunk_size >= params.length) &&
      params.length < (int64_t{1} << 30) && params.batch * params.heads < (int64_t{1} << 16);
  const bool flags = sm90::is_half(params.dtype) && params.k.data != nullptr &&
                     params.order == nullptr && params.buckets == nullptr &&
                     params.dropout_p == 0.0F && params.scale > 0.0F;
  const bool strides = params.q.stride_l <= sm90::kLargestRowStride &&
                       params.k.stride_l <= sm90::kLargestRowStride &&
                       params.v.stride_l <= sm90::kLargestRowStride;
  return sizes && flags && strides && sm90::has_wgmma();
}

}  // namespace reformer::kernels

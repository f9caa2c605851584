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

}  // namespace
}  // namespace tiled

cudaError_t attention_device(DeviceTraits* traits, bool* has_wgmma) {
  const cudaError_t error = current_device_traits(traits);
  *has_wgmma = error == cudaSuccess && has_body<tiled::wgmma_probe>();
  return error;
}

static_assert(kTiledChunk == tiled::kTileRows);
static_assert(kMmaSyncBackwardShared == sizeof(tiled::BackwardShared<tiled::MmaSync<__half>>));

bool wgmma_supports(const ChunkedAttentionParams& params) {
  DeviceTraits traits{};
  bool has_wgmma = false;
  return attention_device(&traits, &has_wgmma) == cudaSuccess &&
         wgmma_suits(params, traits, has_wgmma);
}

bool mma_sync_supports(const ChunkedAttentionParams& params) {
  DeviceTraits traits{};
  return current_device_traits(&traits) == cudaSuccess && mma_sync_suits(params, traits);
}

}  // namespace reformer::kernels

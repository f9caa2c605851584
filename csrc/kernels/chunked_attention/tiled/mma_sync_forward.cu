// mma.sync instances of the forward main kernel.
#include "chunked_attention/tiled/forward.cuh"
#include "tensor_core/mma_tile.cuh"

namespace reformer::kernels {
namespace tiled {
namespace {

// Per multiprocessor: as many as have their shared memory there, and registers without spilling.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
template <int kMasks>
constexpr int kResidentBlocks = kMasks == kPlain ? 4 : 3;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
template <int kMasks>
constexpr int kResidentBlocks = 2;
#else
template <int kMasks>
constexpr int kResidentBlocks = 3;
#endif
constexpr int kLongestRun = 16;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kMasks>)
    forward_kernel(const __grid_constant__ ForwardArgs<Element> args) {
  attend_forward<MmaSync<Element>, kHeadDim, kCausal, kMasks>(args);
}

}  // namespace
}  // namespace tiled

cudaError_t mma_sync_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                             cudaStream_t stream) {
  return tiled::dispatch_masks<32, 64>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return tiled::launch_pass(tiled::forward_kernel<Element, head_dim(), causal(), masks()>,
                                  tiled::ForwardArgs<Element>(params, stage), stage.head_count,
                                  tiled::kThreads,
                                  sizeof(tiled::ForwardShared<tiled::MmaSync<Element>, head_dim()>),
                                  0, tiled::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

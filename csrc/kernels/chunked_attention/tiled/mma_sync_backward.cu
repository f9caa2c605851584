// mma.sync instances of the backward main kernel.
#include "chunked_attention/tiled/backward.cuh"
#include "tensor_core/mma_tile.cuh"

namespace reformer::kernels {
namespace tiled {
namespace {

constexpr int kLongestRun = 32;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ BackwardArgs<Element> args) {
  attend_backward<MmaSync<Element>, kHeadDim, kCausal, kMasks>(args);
}

}  // namespace
}  // namespace tiled

cudaError_t mma_sync_backward(const ChunkedAttentionBackwardParams& params,
                              const BackwardStage& stage, cudaStream_t stream) {
  return tiled::dispatch_masks<32, 64>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return tiled::launch_pass(
            tiled::backward_kernel<Element, head_dim(), causal(), masks()>,
            tiled::BackwardArgs<Element>(params, stage), stage.head_count, tiled::kThreads,
            sizeof(tiled::BackwardShared<tiled::MmaSync<Element>>), 0, tiled::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

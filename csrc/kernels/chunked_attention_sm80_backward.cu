// mma.sync instances of the backward main kernel.
#include "chunked_attention_shared_backward.cuh"
#include "mma_tile.cuh"

namespace reformer::kernels {
namespace sm90 {
namespace {

constexpr int kLongestRun = 32;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ BackwardArgs<Element> args) {
  attend_backward<MmaSync<Element>, kHeadDim, kCausal, kMasks>(args);
}

}  // namespace
}  // namespace sm90

cudaError_t sm80_backward(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                          cudaStream_t stream) {
  return sm90::dispatch_masks<32, 64>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return sm90::launch_pass(
            sm90::backward_kernel<Element, head_dim(), causal(), masks()>,
            sm90::BackwardArgs<Element>(params, stage), stage.head_count, sm90::kThreads,
            sizeof(sm90::BackwardShared<sm90::MmaSync<Element>>), 0, sm90::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

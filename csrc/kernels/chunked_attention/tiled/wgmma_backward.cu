// Wgmma instances of the backward main kernel.
#include "chunked_attention/tiled/backward.cuh"
#include "tensor_core/wgmma.cuh"

namespace reformer::kernels {
namespace tiled {
namespace {

constexpr int kResidentBlocks = 2;  // per multiprocessor
constexpr int kLongestRun = 64;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_kernel(const __grid_constant__ BackwardArgs<Element> args) {
#ifdef REFORMER_SM90A
  attend_backward<Wgmma<Element>, kHeadDim, kCausal, kMasks>(args);
#endif
}

}  // namespace
}  // namespace tiled

cudaError_t wgmma_backward(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                           cudaStream_t stream) {
  if (params.head_dim == 128) return tiled::backward_128(params, stage, stream);
  return tiled::dispatch_masks<32, 64>(params, [&](auto element, auto head_dim, auto causal,
                                                   auto masks) {
    using Element = decltype(element);
    return tiled::launch_pass(tiled::backward_kernel<Element, head_dim(), causal(), masks()>,
                              tiled::BackwardArgs<Element>(params, stage), stage.head_count,
                              tiled::kThreads, sizeof(tiled::BackwardShared<tiled::Wgmma<Element>>),
                              tiled::kResidentBlocks, tiled::kLongestRun, stream);
  });
}

}  // namespace reformer::kernels

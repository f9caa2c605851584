// Wgmma instances of the forward main kernel.
#include "chunked_attention/tiled/forward.cuh"
#include "tensor_core/wgmma.cuh"

namespace reformer::kernels {
namespace tiled {
namespace {

// Per multiprocessor: as many as go without spilled registers.
template <int kHeadDim, int kMasks>
constexpr int kResidentBlocks = kHeadDim > 64        ? 2
                                : kMasks == kBlocked ? 3
                                                     : 4;
template <int kHeadDim>
constexpr int kLongestRun = kHeadDim > 64 ? 32 : 16;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kHeadDim, kMasks>)
    forward_kernel(const __grid_constant__ ForwardArgs<Element> args) {
#ifdef REFORMER_SM90A
  attend_forward<Wgmma<Element>, kHeadDim, kCausal, kMasks>(args);
#endif
}

}  // namespace
}  // namespace tiled

cudaError_t wgmma_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                          cudaStream_t stream) {
  return tiled::dispatch_masks<32, 64, 128>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return tiled::launch_pass(
            tiled::forward_kernel<Element, head_dim(), causal(), masks()>,
            tiled::ForwardArgs<Element>(params, stage), stage.head_count, tiled::kThreads,
            sizeof(tiled::ForwardShared<tiled::Wgmma<Element>, head_dim()>),
            tiled::kResidentBlocks<head_dim(), masks()>, tiled::kLongestRun<head_dim()>, stream);
      });
}

}  // namespace reformer::kernels

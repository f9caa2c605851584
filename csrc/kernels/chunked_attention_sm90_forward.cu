// Wgmma instances of the forward main kernel.
#include "chunked_attention_shared_forward.cuh"
#include "wgmma.cuh"

namespace reformer::kernels {
namespace sm90 {
namespace {

// Per multiprocessor: as many as go without spilled registers.
template <int kHeadDim, int kMasks>
constexpr int kResidentBlocks = kHeadDim > 64        ? 2
                                : kMasks == kBlocked ? 3
                                                     : 4;
constexpr int kLongestRun = 16;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kHeadDim, kMasks>)
    forward_kernel(const __grid_constant__ ForwardArgs<Element> args) {
#ifdef REFORMER_SM90A
  attend_forward<Wgmma<Element>, kHeadDim, kCausal, kMasks>(args);
#endif
}

}  // namespace
}  // namespace sm90

cudaError_t sm90_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                         cudaStream_t stream) {
  return sm90::dispatch_masks<32, 64, 128>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return sm90::launch_pass(
            sm90::forward_kernel<Element, head_dim(), causal(), masks()>,
            sm90::ForwardArgs<Element>(params, stage), stage.head_count, sm90::kThreads,
            sizeof(sm90::ForwardShared<sm90::Wgmma<Element>, head_dim()>),
            sm90::kResidentBlocks<head_dim(), masks()>, sm90::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

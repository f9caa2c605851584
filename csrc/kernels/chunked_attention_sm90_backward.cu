// Wgmma instances of the backward main kernel.
#include "chunked_attention_shared_backward.cuh"
#include "wgmma.cuh"

namespace reformer::kernels {
namespace sm90 {
namespace {

constexpr int kResidentBlocks = 2;  // per multiprocessor
constexpr int kLongestRun = 32;

template <typename Element, int kHeadDim, bool kCausal, int kMasks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_kernel(const __grid_constant__ BackwardArgs<Element> args) {
#ifdef REFORMER_SM90A
  attend_backward<Wgmma<Element>, kHeadDim, kCausal, kMasks>(args);
#endif
}

}  // namespace
}  // namespace sm90

cudaError_t sm90_backward(const ChunkedAttentionBackwardParams& params, const BackwardStage& stage,
                          cudaStream_t stream) {
  if (params.head_dim == 128) return sm90::backward_128(params, stage, stream);
  return sm90::dispatch_masks<32, 64>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return sm90::launch_pass(sm90::backward_kernel<Element, head_dim(), causal(), masks()>,
                                 sm90::BackwardArgs<Element>(params, stage), stage.head_count,
                                 sm90::kThreads, sizeof(sm90::BackwardShared<sm90::Wgmma<Element>>),
                                 sm90::kResidentBlocks, sm90::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

// mma.sync instances of the forward main kernel.
#include "chunked_attention_shared_forward.cuh"
#include "mma_tile.cuh"

namespace reformer::kernels {
namespace sm90 {
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
}  // namespace sm90

cudaError_t sm80_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                         cudaStream_t stream) {
  return sm90::dispatch_masks<32, 64>(
      params, [&](auto element, auto head_dim, auto causal, auto masks) {
        using Element = decltype(element);
        return sm90::launch_pass(sm90::forward_kernel<Element, head_dim(), causal(), masks()>,
                                 sm90::ForwardArgs<Element>(params, stage), stage.head_count,
                                 sm90::kThreads,
                                 sizeof(sm90::ForwardShared<sm90::MmaSync<Element>, head_dim()>), 0,
                                 sm90::kLongestRun, stream);
      });
}

}  // namespace reformer::kernels

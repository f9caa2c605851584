// mma.sync instances of the forward main kernel.
#include "chunked_attention_shared_forward.cuh"
#include "mma_tile.cuh"

namespace reformer::kernels {
namespace sm90 {
namespace {

constexpr int kLongestRun = 16;

template <typename Element, int kHeadDim, bool kCausal>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const __grid_constant__ ForwardArgs<Element> args) {
  attend_forward<MmaSync<Element>, kHeadDim, kCausal, kPlain>(args);
}

}  // namespace
}  // namespace sm90

cudaError_t sm80_forward(const ChunkedAttentionParams& params, const ForwardStage& stage,
                         cudaStream_t stream) {
  return sm90::dispatch<32, 64>(params, [&](auto element, auto head_dim, auto causal) {
    using Element = decltype(element);
    return sm90::launch_pass(
        sm90::forward_kernel<Element, head_dim(), causal()>,
        sm90::ForwardArgs<Element>(params, stage), stage.head_count, sm90::kThreads,
        sizeof(sm90::ForwardShared<sm90::MmaSync<Element>, head_dim(), sm90::kPlain>), 0,
        sm90::kLongestRun, stream);
  });
}

}  // namespace reformer::kernels

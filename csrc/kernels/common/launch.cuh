// Launches whose start overlaps with the end of the kernel before them in the stream (programmatic
// dependent launch, from sm_90 on): that hides the microsecond or two between kernels, which is
// what short sequences take.
#pragma once

#include <cuda_runtime_api.h>

#include "common/device_traits.cuh"

namespace reformer::kernels {

// A kernel launched by launch_overlapped calls this before it touches global memory.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take up multiprocessors from now on. Not for a kernel with much
// shared memory before one bound by memory: it would inherit a small L1 cache, and took a third
// longer.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Says whether this build's code for the current device has these two (what is compiled from PTX
// for sm_80 has not, on whatever device): see has_body.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kOverlapProbeThreads = 32;
#else
constexpr int kOverlapProbeThreads = 64;
#endif
[[maybe_unused]] static __global__ __launch_bounds__(kOverlapProbeThreads) void overlap_probe() {}

struct LaunchShape {
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks of a thread-block cluster
};

template <typename... Params, typename... Args>
cudaError_t launch_overlapped(void (*kernel)(Params...), const LaunchShape& shape,
                              cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (has_body<overlap_probe>()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace reformer::kernels

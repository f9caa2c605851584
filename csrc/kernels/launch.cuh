// Launches whose start overlaps with the end of the kernel before them in the stream (programmatic
// dependent launch, from sm_90 on): that hides the microsecond or two between kernels, which is
// what short sequences take.
#pragma once

#include <cuda_runtime_api.h>

#include "device_traits.cuh"

namespace reformer::kernels {

// A kernel launched by launch_overlapped begins with this, before it touches global memory: the
// next kernel may take up free multiprocessors, this one waits until the one before has finished.
__device__ __forceinline__ void overlap_neighbours() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks of a thread-block cluster
};

template <typename... Params, typename... Args>
cudaError_t launch_overlapped(void (*kernel)(Params...), const LaunchShape& shape,
                              cudaStream_t stream, const Args&... args) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (traits.major >= 9) {
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

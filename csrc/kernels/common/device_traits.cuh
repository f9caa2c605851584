// What launchers ask about the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device.h"

namespace reformer::kernels {

// Whether the environment says NAME=1.
inline bool environment_asks_for(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// REFORMER_FORCE_SM80=1: devices pass for an A100, to test and time on a newer one what that would
// run.
inline void restrict_to_sm80(DeviceTraits* traits) {
  if (!environment_asks_for("REFORMER_FORCE_SM80") || traits->major < 8) return;
  traits->major = 8;
  traits->minor = 0;
  traits->shared_memory = 163 * 1024;
}

// Queried once for all devices: cheap on every call, allowed during graph capture.
inline cudaError_t current_device_traits(DeviceTraits* traits) {
  static const std::vector<DeviceTraits> devices = [] {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<DeviceTraits> queried(count);
    for (int device = 0; device < count; ++device) {
      DeviceTraits& t = queried[device];
      const bool known =
          cudaDeviceGetAttribute(&t.major, cudaDevAttrComputeCapabilityMajor, device) ==
              cudaSuccess &&
          cudaDeviceGetAttribute(&t.minor, cudaDevAttrComputeCapabilityMinor, device) ==
              cudaSuccess &&
          cudaDeviceGetAttribute(&t.multiprocessors, cudaDevAttrMultiProcessorCount, device) ==
              cudaSuccess &&
          cudaDeviceGetAttribute(&t.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 device) == cudaSuccess;
      if (!known) t = DeviceTraits{};
      restrict_to_sm80(&t);
    }
    return queried;
  }();
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= static_cast<int>(devices.size()) || devices[device].multiprocessors == 0) {
    return cudaErrorInvalidDevice;
  }
  *traits = devices[device];
  return cudaSuccess;
}

// Whether the build holds the real body of kKernel for the current device. Kernels with a body for
// some architectures only are compiled elsewhere with a launch bound of one warp, which their
// attributes tell.
template <auto kKernel>
bool has_body() {
  constexpr int kWarp = 32, kDevices = 64;
  enum State : signed char { unknown, present, absent };
  static std::array<std::atomic<State>, kDevices> states{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < kDevices && states[device] != unknown) return states[device] == present;
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) {
    cudaGetLastError();  // not an error of the caller's
    return false;
  }
  const bool found = attributes.maxThreadsPerBlock > kWarp;
  if (device < kDevices) states[device] = found ? present : absent;
  return found;
}

}  // namespace reformer::kernels

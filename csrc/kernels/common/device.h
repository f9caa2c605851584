// What kernels are chosen by, of a device. No CUDA here: plans are made, and tested, without a GPU.
#pragma once

#include "host_device.h"

namespace reformer::kernels {

struct DeviceTraits {
  int major, minor;  // compute capability
  int multiprocessors;
  int shared_memory;  // bytes a block may ask for
};

template <typename Integer>
REFORMER_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <typename Integer>
REFORMER_HOST_DEVICE constexpr Integer round_up(Integer a, Integer multiple) {
  return ceil_div(a, multiple) * multiple;
}

}  // namespace reformer::kernels

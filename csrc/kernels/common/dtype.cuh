// The element types that DType names, and vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace reformer::kernels {

// Elements that are loaded and stored together, 16 bytes unless the width is given.
template <typename T, int kWidthGiven = 16 / sizeof(T)>
struct alignas(16) Vector {
  static constexpr int kWidth = kWidthGiven;
  T x[kWidth];
};

// launch(Element{}) for the dtype's element.
template <typename Launch>
cudaError_t dispatch_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::f32:
      return launch(float{});
    case DType::f16:
      return launch(__half{});
    case DType::bf16:
      return launch(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace reformer::kernels

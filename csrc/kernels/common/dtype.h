// Element types the kernels know. Torch-free, like everything under kernels/.
#pragma once

namespace reformer::kernels {

enum class DType { f32, f16, bf16 };

}  // namespace reformer::kernels

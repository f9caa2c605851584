// Angular LSH by random rotations (Reformer, section 2): bucket = argmax([xR; -xR]) per factor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lsh_hash/params.h"

namespace reformer::kernels {

// Bytes of scratch that lsh_hash needs for these sizes (0 when it needs none).
int64_t lsh_hash_workspace(const LshHashParams& params);

// Enqueues; never synchronises or allocates.
cudaError_t lsh_hash(const LshHashParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

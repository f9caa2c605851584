// Packs the rotations for the tensor-core instances of the hash: packing.h.
#pragma once

#include <cuda_runtime_api.h>

#include "lsh_hash/packing.h"

namespace reformer::kernels::packed_hash {

// Fills params.workspace, packed_bytes long.
cudaError_t pack_rotations(const LshHashParams& params, const HashColumns& columns,
                           const Packing& packing, cudaStream_t stream);

}  // namespace reformer::kernels::packed_hash

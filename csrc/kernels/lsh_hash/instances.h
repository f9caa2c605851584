// The instances of the hash.
#pragma once

#include <cuda_runtime_api.h>

#include "lsh_hash/params.h"

namespace reformer::kernels {

// The instances that lsh_hash chooses from; params are those of lsh_hash, valid and not empty.

// Tensor cores, x and rotations of one 16-bit type: wgmma on sm_90a (wgmma.cu), mma.sync from
// sm_80 on (mma_sync.cu).
bool lsh_hash_has_wgmma();  // this build has wgmma code for the current device
bool lsh_hash_wgmma_supports(const LshHashParams& params);
int64_t lsh_hash_wgmma_workspace(const LshHashParams& params);
cudaError_t lsh_hash_wgmma(const LshHashParams& params, cudaStream_t stream);
bool lsh_hash_mma_sync_supports(const LshHashParams& params);
int64_t lsh_hash_mma_sync_workspace(const LshHashParams& params);
cudaError_t lsh_hash_mma_sync(const LshHashParams& params, cudaStream_t stream);

// A block for each token and round, without workspace (direct.cu): for few tokens.
bool lsh_hash_direct_supports(const LshHashParams& params);
cudaError_t lsh_hash_direct(const LshHashParams& params, cudaStream_t stream);

// Everything, without workspace (entry.cu).
cudaError_t lsh_hash_simt(const LshHashParams& params, cudaStream_t stream);

}  // namespace reformer::kernels

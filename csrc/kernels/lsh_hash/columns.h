// The columns of the rotations as the hash kernels walk them: round after round, factor after
// factor, each factor's columns padded to whole tiles.
#pragma once

#include "lsh_hash.h"

namespace reformer::kernels {

struct HashColumns {
  int n_factors, tiles_per_round;
  int columns;         // of one round in the rotations
  int padding_bucket;  // the product of the factors
  struct Factor {
    int first_column;  // in the round
    int columns;       // half the factor: column c stands for the digits c and columns + c
    int tiles;
    int place;  // what a digit counts in the bucket: the product of the factors before
  } factors[kMaxHashFactors];

  HashColumns(const LshHashParams& params, int tile_width) : n_factors(params.n_factors) {
    tiles_per_round = columns = 0;
    padding_bucket = 1;
    for (int f = 0; f < n_factors; ++f) {
      const int half = params.factors[f] / 2, tiles = (half + tile_width - 1) / tile_width;
      factors[f] = {columns, half, tiles, padding_bucket};
      columns += half;
      tiles_per_round += tiles;
      padding_bucket *= params.factors[f];
    }
  }
};

// Of one factor: the column with the largest absolute value so far, and its value.
struct alignas(8) LargestColumn {
  float value;
  int column;
};

// The instances that lsh_hash chooses from; params are those of lsh_hash, valid and not empty.

// Tensor cores, x and rotations of one 16-bit type: wgmma on sm_90a (wgmma.cu), mma.sync from
// sm_80 on (mma_sync.cu).
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

// The columns of the rotations as the hash kernels walk them: round after round, factor after
// factor, each factor's columns padded to whole tiles.
#pragma once

#include "lsh_hash/params.h"

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

}  // namespace reformer::kernels

// Which instance of the hash runs. No CUDA here: the same for the kernels and for
// reformer_ext.plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "lsh_hash/columns.h"
#include "lsh_hash/packing.h"
#include "lsh_hash/tuning.h"

namespace reformer::kernels {

enum class HashKernel { direct, wgmma, mma_sync, simt };

struct HashPlan {
  HashKernel kernel;
  int64_t workspace;  // bytes, of packed rotations
};

inline const char* name_of(HashKernel kernel) {
  switch (kernel) {
    case HashKernel::direct:
      return "direct";
    case HashKernel::wgmma:
      return "wgmma";
    case HashKernel::mma_sync:
      return "mma_sync";
    case HashKernel::simt:
      return "simt";
  }
  return "";
}

inline bool hash_is_valid(const LshHashParams& params) {
  if (params.batch < 0 || params.heads < 0 || params.length < 0 || params.rounds < 0 ||
      params.head_dim < 1 || params.n_factors < 1 || params.n_factors > kMaxHashFactors) {
    return false;
  }
  int64_t buckets = 1;
  for (int f = 0; f < params.n_factors; ++f) {
    if (params.factors[f] < 2 || params.factors[f] % 2 != 0) return false;
    buckets *= params.factors[f];
    if (buckets >= INT32_MAX) return false;  // the padding bucket follows
  }
  return params.rotation_heads == 1 || params.rotation_heads == params.heads;
}

inline bool hash_direct_supports(const LshHashParams& params) {
  // What every device gives unasked, less the digits. Whatever the split, a thread has at most 8
  // sums, or there are as many as columns.
  constexpr int64_t kSharedFloats = 47 * 1024 / sizeof(float);
  const int64_t sums = std::max(HashColumns(params, 1).columns, 8 * hash_tuning::kDirectThreads);
  return params.batch * params.heads * params.length * params.rounds <= INT32_MAX &&
         params.head_dim + sums <= kSharedFloats;
}

inline bool has_few_tokens(const LshHashParams& params) {
  return params.batch * params.length <= hash_tuning::kFewTokens && hash_direct_supports(params);
}

inline packed_hash::Packing wgmma_packing(const LshHashParams& params, const DeviceTraits& traits) {
  return packed_hash::make_packing(params, packed_hash::lane_columns(params),
                                   hash_tuning::kWgmmaChunk,
                                   traits.shared_memory - hash_tuning::kWgmmaAlignment);
}

// With few tokens, more warps share the rounds.
inline packed_hash::Packing mma_sync_packing(const LshHashParams& params,
                                             const DeviceTraits& traits) {
  const int steps = hash_tuning::steps_of(params.head_dim);
  const int64_t tiles =
      params.batch * params.heads *
      ceil_div<int64_t>(params.length, 16 * hash_tuning::mma_sync_row_tiles(steps));
  const int64_t warps = int64_t{traits.multiprocessors} * hash_tuning::mma_sync_warps(steps);
  return packed_hash::make_packing(params, packed_hash::lane_columns(params),
                                   hash_tuning::kMmaSyncChunk, traits.shared_memory,
                                   warps / std::max<int64_t>(tiles, 1));
}

inline bool packing_fits(const packed_hash::Packing& packing) {
  return packing.rounds > 0 && packing.groups <= 65535;  // groups are blockIdx.y
}

// has_wgmma: the build has wgmma code for the device.
inline bool hash_wgmma_supports(const LshHashParams& params, const DeviceTraits& traits,
                                bool has_wgmma) {
  return packed_hash::suits(params) && traits.major == 9 && traits.minor == 0 && has_wgmma &&
         packing_fits(wgmma_packing(params, traits));
}

inline bool hash_mma_sync_supports(const LshHashParams& params, const DeviceTraits& traits) {
  return packed_hash::suits(params) && traits.major >= 8 &&
         packing_fits(mma_sync_packing(params, traits));
}

inline HashPlan plan_lsh_hash(const LshHashParams& params, const DeviceTraits& traits,
                              bool has_wgmma) {
  if (!hash_is_valid(params)) return {HashKernel::simt, 0};
  if (has_few_tokens(params)) return {HashKernel::direct, 0};
  if (hash_wgmma_supports(params, traits, has_wgmma)) {
    return {HashKernel::wgmma, packed_hash::packed_bytes(params, wgmma_packing(params, traits))};
  }
  if (hash_mma_sync_supports(params, traits)) {
    return {HashKernel::mma_sync,
            packed_hash::packed_bytes(params, mma_sync_packing(params, traits))};
  }
  return {HashKernel::simt, 0};
}

}  // namespace reformer::kernels

// Which way the buckets are sorted. No CUDA here: the same for the kernels and for
// reformer_ext.plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bucket_sort/params.h"
#include "bucket_sort/tuning.h"
#include "common/device.h"

namespace reformer::kernels::sort {

inline constexpr int kScratchWords = 64;

// Where the parts of the dynamic shared memory begin, in 32-bit words.
struct TileMemory {
  int counts_stride;  // 16-bit counters per warp
  int totals, starts, shifts, scratch, end;

  REFORMER_HOST_DEVICE TileMemory(int warps, int staged_bytes, int bins) {
    counts_stride = round_up(bins, 8);
    const int counts = warps * counts_stride / 2, staged = staged_bytes / 4;
    totals = counts > staged ? counts : staged;  // the staged items overwrite the counters
    starts = totals + counts_stride;
    shifts = starts + counts_stride;
    scratch = shifts + counts_stride;
    end = scratch + kScratchWords;
  }
  REFORMER_HOST_DEVICE int bytes() const { return end * 4; }
};

enum class Method { cluster, tiles, packed, wide };

inline const char* name_of(Method method) {
  switch (method) {
    case Method::cluster:
      return "cluster";
    case Method::tiles:
      return "tiles";
    case Method::packed:
      return "packed";
    case Method::wide:
      return "wide";
  }
  return "";
}

struct Plan {
  Method method;
  int cluster;  // blocks per segment
  int passes, bits,
      digit_bits;                         // of the buckets and of the first pass, the longest
  int position_bits;                      // of a position
  int64_t group;                          // segments sorted together: they share the workspace
  int64_t histogram_bytes, record_bytes;  // per segment and buffer
  int record_buffers;

  int64_t workspace() const { return group * (histogram_bytes + record_buffers * record_bytes); }
};

inline int tiles_of(int64_t length, int tile) {
  return static_cast<int>(ceil_div<int64_t>(length, tile));
}

inline int bits_of(int64_t n_buckets) {
  int bits = 1;
  while ((int64_t{1} << bits) < n_buckets) ++bits;
  return bits;
}

// Time of a kernel whose blocks work through `items` each, in items of one multiprocessor. The
// constants fit measurements on an H200.
inline int64_t cluster_cost(const BucketSortParams& params, int cluster, int multiprocessors) {
  // A cluster lives within one group of 16 to 18 multiprocessors, so larger ones leave some idle.
  const int64_t slots =
      std::max(1, cluster <= 2 ? multiprocessors / cluster : multiprocessors * 7 / 8 / cluster);
  return ceil_div(params.segments, slots) *
         (ceil_div<int64_t>(params.length, cluster) + kBlockStart);
}
inline int64_t tiles_cost(const BucketSortParams& params, int multiprocessors) {
  // A tile that is not full takes as long as one that is.
  const int64_t items = params.segments * tiles_of(params.length, kTile) * kTile;
  return kLaunches + std::max<int64_t>(kTile, items / multiprocessors) * 5 / 4;
}

inline Plan plan_tiles(const BucketSortParams& params, Method method, int passes, int tile,
                       int64_t bins, int record_bytes) {
  Plan plan{method, 0, passes, 0, 0, 0, 0, 0, 0, 0};
  plan.histogram_bytes = round_up<int64_t>((tiles_of(params.length, tile) + 1) * bins * 4, 256);
  plan.record_bytes = round_up<int64_t>(params.length * record_bytes, 256);
  plan.record_buffers = std::min(passes - 1, 2);
  const int64_t per_segment = plan.histogram_bytes + plan.record_buffers * plan.record_bytes;
  plan.group = std::clamp<int64_t>(kWorkspaceTarget / per_segment, 1, params.segments);
  return plan;
}

// has_clusters: the build has code with clusters for the device.
inline Plan make_plan(const BucketSortParams& params, const DeviceTraits& traits,
                      bool has_clusters) {
  const auto fits = [&](int threads, int items) {
    if (params.n_buckets > kMaxTileBuckets) return false;
    const TileMemory memory(threads / 32, threads * items * int{sizeof(uint32_t)},
                            static_cast<int>(params.n_buckets));
    return memory.bytes() <= traits.shared_memory;
  };

  const bool tiles_fit = fits(kTileThreads, kTileItems);
  if (traits.major >= 9 && has_clusters && fits(kClusterThreads, kMaxClusterItems)) {
    int best = 0;
    int64_t best_cost = tiles_fit ? tiles_cost(params, traits.multiprocessors) : INT64_MAX;
    for (const int cluster : kClusters) {
      if (ceil_div<int64_t>(params.length, cluster) > kMaxClusterTile) continue;
      const int64_t cost = cluster_cost(params, cluster, traits.multiprocessors);
      if (cost < best_cost) {
        best = cluster;
        best_cost = cost;
      }
    }
    if (best != 0 && params.segments * best <= INT32_MAX) {
      return {Method::cluster, best, 1, 0, 0, 0, params.segments, 0, 0, 0};
    }
  }
  if (tiles_fit) return plan_tiles(params, Method::tiles, 1, kTile, params.n_buckets, 0);
  const int bits = bits_of(params.n_buckets), position_bits = bits_of(params.length);
  const int passes = ceil_div(bits, kMaxDigitBits);
  // In packed records what the first digit leaves of the bucket shares 32 bits with the position.
  const int packed_digit_bits = std::max(ceil_div(bits, passes), bits + position_bits - 32);
  const bool packed =
      passes > 1 && packed_digit_bits <= kMaxDigitBits && bits - packed_digit_bits <= kRestBits;
  const int digit_bits = packed ? packed_digit_bits : ceil_div(bits, passes);
  const int64_t bins = int64_t{1} << digit_bits;
  Plan plan = packed ? plan_tiles(params, Method::packed, passes, kPackedTile, bins, 4)
                     : plan_tiles(params, Method::wide, passes, kWideTile, bins, 8);
  plan.bits = bits;
  plan.digit_bits = digit_bits;
  plan.position_bits = position_bits;
  return plan;
}

inline bool valid(const BucketSortParams& params) {
  return params.segments >= 0 && params.length >= 0 && params.length <= INT32_MAX &&
         params.n_buckets >= 1 && params.n_buckets <= INT32_MAX;
}

}  // namespace reformer::kernels::sort

// Which way the buckets are sorted depends on the sizes and the device alone:
//
//   - cluster: a thread-block cluster holds a whole segment and exchanges histograms through
//     distributed shared memory. One kernel, every element read and written once (sm_90 up, up to
//     about 3000 buckets).
//   - tiles: histograms of tiles, a scan over each segment's tiles, a stable scatter of every tile.
//   - packed: two or three least-significant-digit passes of that kind, whose scatter is
//     digit.cuh's, over 32-bit records: where the position and what the first digit
//     leaves of the bucket fit them.
//   - wide: as many passes as the buckets have bytes, over 64-bit records. Any size.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstddef>

#include "bucket_sort.h"
#include "bucket_sort/digit.cuh"
#include "bucket_sort/plan.h"
#include "bucket_sort/tile.cuh"

namespace reformer::kernels {
namespace sort {
namespace {

// ---- Cluster

#if __CUDA_ARCH__ >= 900
// Bins start where the bins before them end in the whole segment, behind the same bin of earlier
// blocks.
struct ClusterBinStarts {
  int bins;

  __device__ void operator()(uint32_t* totals, uint32_t* starts, uint32_t* shifts,
                             uint32_t* scratch) const {
    const auto cluster = cooperative_groups::this_cluster();
    const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    cluster.sync();  // every block's totals are written
    uint2 sum = make_uint2(0, 0);
    for (int base = 0; base < bins; base += kClusterThreads) {
      const int bin = base + threadIdx.x;
      uint32_t own = 0, earlier = 0, all = 0;
      if (bin < bins) {
        own = totals[bin];
        for (int block = 0; block < blocks; ++block) {
          const uint32_t count =
              block == rank ? own : *cluster.map_shared_rank(totals + bin, block);
          if (block < rank) earlier += count;
          all += count;
        }
      }
      const uint2 start = exclusive_scan<kClusterThreads / 32>(make_uint2(own, all), sum, scratch);
      if (bin < bins) {
        starts[bin] = start.x;
        shifts[bin] = start.y + earlier - start.x;
      }
    }
    cluster.barrier_arrive();  // this block has read the others' totals
  }
};
#endif

// Clusters need sm_90; see has_body.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kClusterLaunchBound = 32;
#else
constexpr int kClusterLaunchBound = kClusterThreads;
#endif

template <int kItems>
__global__ __launch_bounds__(kClusterLaunchBound) void cluster_kernel(const int32_t* buckets,
                                                                      int32_t* order, int length,
                                                                      int n_buckets) {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(16) uint32_t shared[];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks();
  const int64_t segment = blockIdx.x / blocks;
  const int per_block = round_up(ceil_div(length, blocks), 32);
  const int begin = static_cast<int>(cluster.block_rank()) * per_block;
  const Tile tile{begin, max(0, min(per_block, length - begin)),
                  ceil_div(per_block, kClusterThreads)};
  const BucketsToOrder pass{buckets + segment * length, order + segment * length, n_buckets};
  sort_tile<BucketsToOrder, kClusterThreads, kItems>(pass, tile, n_buckets, shared,
                                                     ClusterBinStarts{n_buckets});
  cluster.barrier_wait();  // no block may leave while others read its totals
#endif
}

template <int kItems>
cudaError_t launch_cluster(const BucketSortParams& params, int cluster, cudaStream_t stream) {
  const auto kernel = cluster_kernel<kItems>;
  const int n_buckets = static_cast<int>(params.n_buckets);
  const int bytes =
      TileMemory(kClusterThreads / 32, kClusterThreads * kItems * int{sizeof(uint32_t)}, n_buckets)
          .bytes();
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(params.segments * cluster));
  return launch_overlapped(kernel, {grid, kClusterThreads, bytes, cluster}, stream, params.buckets,
                           params.order, params.length, n_buckets);
}

cudaError_t cluster_sort(const BucketSortParams& params, int cluster, cudaStream_t stream) {
  const int64_t per_block = ceil_div<int64_t>(params.length, cluster);
  if (per_block <= 8 * kClusterThreads) return launch_cluster<8>(params, cluster, stream);
  if (per_block <= 16 * kClusterThreads) return launch_cluster<16>(params, cluster, stream);
  return launch_cluster<kMaxClusterItems>(params, cluster, stream);
}

// ---- Tiles: one pass of histogram, scan and scatter

// The tile of a block.
struct TileIndex {
  int segment, tile;

  __device__ explicit TileIndex(int tiles)
      : segment(blockIdx.x / tiles), tile(blockIdx.x % tiles) {}
  __device__ int64_t begin(int items) const { return int64_t{tile} * items; }
  __device__ int count(int items, int64_t length) const {
    const int64_t left = length - begin(items);
    return left < items ? static_cast<int>(left) : items;
  }
  __device__ int64_t row() const { return int64_t{blockIdx.x} + segment; }  // tiles + 1 a segment
};

// histograms: [segments, tiles + 1, bins]; the last row is scan_kernel's.
constexpr int kHistogramThreads = 512;
template <class MakePass>
__global__ __launch_bounds__(kHistogramThreads) void histogram_kernel(MakePass make_pass,
                                                                      uint32_t* histograms,
                                                                      int64_t length, int tiles,
                                                                      int bins) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(16) uint32_t counts[];
  const TileIndex index(tiles);
  const auto pass = make_pass(index.segment);
  const int64_t begin = index.begin(MakePass::kTile);
  const int count = index.count(MakePass::kTile, length);
  const typename MakePass::Pass::Input* from = pass.input + begin;
  forget_uses(from);  // or every load computes it anew
  for (int bin = threadIdx.x; bin < bins; bin += kHistogramThreads) counts[bin] = 0;
  __syncthreads();
#pragma unroll 8
  for (int item = threadIdx.x; item < count; item += kHistogramThreads) {
    atomicAdd(counts + pass.digit(pass.key(__ldg(from + item), begin + item)), 1u);
  }
  __syncthreads();
  uint32_t* out = histograms + index.row() * bins;
  for (int bin = threadIdx.x; bin < bins; bin += kHistogramThreads) out[bin] = counts[bin];
}

// In place: from a tile's count of a bin to the bin's first slot of that tile in the segment; the
// row after the last tile's tells where the bins end. The threads are `rows` rows of `columns`: a
// column is a bin, a row a share of the tiles.
constexpr int kScanThreads = 1024;
__global__ __launch_bounds__(kScanThreads) void scan_kernel(uint32_t* histograms, int tiles,
                                                            int bins, int columns) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  __shared__ uint32_t sums[kScanThreads], first_slot[kScanThreads], scratch[kScratchWords];
  uint32_t* segment = histograms + int64_t{blockIdx.x} * (tiles + 1) * bins;
  const int rows = kScanThreads / columns, row = threadIdx.x / columns,
            column = threadIdx.x % columns;
  const int per_row = ceil_div(tiles, rows);
  const int begin = min(row * per_row, tiles), end = min(begin + per_row, tiles);
  uint2 total = make_uint2(0, 0);
  for (int base = 0; base < bins; base += columns) {
    const int bin = base + column;
    uint32_t* counts = segment + bin;
    uint32_t sum = 0;
    if (bin < bins) {
#pragma unroll 16
      for (int tile = begin; tile < end; ++tile) sum += counts[int64_t{tile} * bins];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    uint32_t earlier = 0, all = 0;
    for (int other = 0; other < rows; ++other) {
      const uint32_t count = sums[other * columns + column];
      if (other < row) earlier += count;
      all += count;
    }
    const uint2 start =
        exclusive_scan<kScanThreads / 32>(make_uint2(row == 0 ? all : 0, 0), total, scratch);
    if (row == 0) first_slot[column] = start.x;
    __syncthreads();
    uint32_t slot = first_slot[column] + earlier;
    if (bin < bins) {
#pragma unroll 8
      for (int tile = begin; tile < end; ++tile) {
        const uint32_t count = counts[int64_t{tile} * bins];
        counts[int64_t{tile} * bins] = slot;
        slot += count;
      }
      if (row == rows - 1) counts[int64_t{tiles} * bins] = slot;
    }
  }
}

struct ScannedBinStarts {
  const uint32_t* slots;  // of this tile, from scan_kernel
  int bins;

  __device__ void operator()(uint32_t* totals, uint32_t* starts, uint32_t* shifts,
                             uint32_t* scratch) const {
    __syncthreads();  // the totals are written
    uint2 sum = make_uint2(0, 0);
    for (int base = 0; base < bins; base += kTileThreads) {
      const int bin = base + threadIdx.x;
      const uint32_t own = bin < bins ? totals[bin] : 0;
      const uint2 start = exclusive_scan<kTileThreads / 32>(make_uint2(own, 0), sum, scratch);
      if (bin < bins) {
        starts[bin] = start.x;
        shifts[bin] = slots[bin] - start.x;
      }
    }
  }
};

template <class MakePass>
__global__ __launch_bounds__(kTileThreads,
                             2) void scatter_kernel(MakePass make_pass, const uint32_t* slots,
                                                    int64_t length, int tiles, int bins) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(16) uint32_t shared[];
  const TileIndex index(tiles);
  const auto pass = make_pass(index.segment);
  const Tile tile{index.begin(kTile), index.count(kTile, length), kTileItems};
  const ScannedBinStarts bin_starts{slots + index.row() * bins, bins};
  sort_tile<typename MakePass::Pass, kTileThreads, kTileItems>(pass, tile, bins, shared,
                                                               bin_starts);
}

template <class MakePass>
__global__ __launch_bounds__(kDigitThreads, kDigitBlocks) void digit_scatter_kernel(
    MakePass make_pass, const uint32_t* slots, int64_t length, int tiles, int bins) {
  wait_for_previous_kernel();  // the next one waits as well: see let_next_kernel_start
  extern __shared__ __align__(16) uint32_t shared[];
  const TileIndex index(tiles);
  sort_tile_by_digit(make_pass(index.segment), index.begin(MakePass::kTile),
                     index.count(MakePass::kTile, length), bins, slots + index.row() * bins,
                     shared);
}

// The passes of a segment, by its number.
struct MakeBucketsToOrder {
  using Pass = BucketsToOrder;
  static constexpr int kTile = sort::kTile;
  const int32_t* buckets;
  int32_t* order;
  int64_t length;
  int n_buckets;
  __device__ Pass operator()(int64_t segment) const {
    return {buckets + segment * length, order + segment * length, n_buckets};
  }
};
struct MakeBucketsToPacked {
  using Pass = BucketsToPacked;
  static constexpr int kTile = kDigitTile<Pass>;
  const int32_t* buckets;
  uint32_t* records;
  int64_t length;
  int n_buckets, digit_bits, position_bits;
  __device__ Pass operator()(int64_t segment) const {
    return {buckets + segment * length, records + segment * length, n_buckets, digit_bits,
            position_bits};
  }
};
template <bool kLast>
struct MakePackedPass {
  using Pass = PackedPass<kLast>;
  static constexpr int kTile = kDigitTile<Pass>;
  const uint32_t* records;
  typename Pass::Output* output;
  int64_t length;
  int digit_shift, digit_bits, position_bits;
  __device__ Pass operator()(int64_t segment) const {
    return {records + segment * length, output + segment * length, digit_shift, digit_bits,
            position_bits};
  }
};
template <bool kFirst, bool kLast>
struct MakeWidePass {
  using Pass = WidePass<kFirst, kLast>;
  static constexpr int kTile = kDigitTile<Pass>;
  const typename Pass::Input* input;
  typename Pass::Output* output;
  int64_t length;
  int n_buckets, digit_shift, digit_bits;
  __device__ Pass operator()(int64_t segment) const {
    return {input + segment * length, output + segment * length, n_buckets, digit_shift,
            digit_bits};
  }
};

// A pass whose scatter runs in blocks of `threads` with `scatter_bytes` of shared memory.
template <class MakePass>
cudaError_t run_pass(const MakePass& make_pass,
                     void (*scatter)(MakePass, const uint32_t*, int64_t, int, int), int threads,
                     int scatter_bytes, uint32_t* histograms, const BucketSortParams& params,
                     int bins, cudaStream_t stream) {
  const int tiles = tiles_of(params.length, MakePass::kTile);
  const int64_t blocks = params.segments * tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)),
      segment_grid(static_cast<unsigned>(params.segments));
  cudaError_t error =
      cudaFuncSetAttribute(scatter, cudaFuncAttributeMaxDynamicSharedMemorySize, scatter_bytes);
  if (error != cudaSuccess) return error;
  int columns = 32;
  while (columns < bins && columns < kScanThreads) columns *= 2;

  error = launch_overlapped(histogram_kernel<MakePass>,
                            {grid, kHistogramThreads, bins * int64_t{sizeof(uint32_t)}}, stream,
                            make_pass, histograms, params.length, tiles, bins);
  if (error != cudaSuccess) return error;
  error = launch_overlapped(scan_kernel, {segment_grid, kScanThreads}, stream, histograms, tiles,
                            bins, columns);
  if (error != cudaSuccess) return error;
  return launch_overlapped(scatter, {grid, threads, scatter_bytes}, stream, make_pass, histograms,
                           params.length, tiles, bins);
}

template <class MakePass>
cudaError_t run_digit_pass(const MakePass& make_pass, uint32_t* histograms,
                           const BucketSortParams& params, int digit_bits, cudaStream_t stream) {
  const int bins = 1 << digit_bits;
  return run_pass(make_pass, digit_scatter_kernel<MakePass>, kDigitThreads,
                  DigitMemory(bins).bytes(), histograms, params, bins, stream);
}

static_assert(kPackedTile == kDigitTile<BucketsToPacked>);
static_assert(kWideTile == MakeWidePass<true, true>::kTile);

cudaError_t plan_here(const BucketSortParams& params, Plan* plan) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error == cudaSuccess) {
    *plan = make_plan(params, traits, has_body<cluster_kernel<kMaxClusterItems>>());
  }
  return error;
}

// ---- The sorts of one group of segments

cudaError_t tiles_sort(const BucketSortParams& params, cudaStream_t stream) {
  const int n_buckets = static_cast<int>(params.n_buckets);
  const int bytes = TileMemory(kTileThreads / 32, kTile * int{sizeof(uint32_t)}, n_buckets).bytes();
  return run_pass(MakeBucketsToOrder{params.buckets, params.order, params.length, n_buckets},
                  scatter_kernel<MakeBucketsToOrder>, kTileThreads, bytes,
                  static_cast<uint32_t*>(params.workspace), params, n_buckets, stream);
}

// The buffers of records, after the histograms. Passes alternate between them; with one pass or
// two, the second is not touched.
std::byte* record_buffer(const BucketSortParams& params, const Plan& plan, int pass) {
  return static_cast<std::byte*>(params.workspace) +
         params.segments * (plan.histogram_bytes + pass % 2 * plan.record_bytes);
}

template <bool kLast>
cudaError_t packed_pass(const BucketSortParams& params, const Plan& plan, int pass, int bits_before,
                        int digit_bits, cudaStream_t stream) {
  using MakePass = MakePackedPass<kLast>;
  void* output = kLast ? static_cast<void*>(params.order) : record_buffer(params, plan, pass);
  const MakePass make_pass{reinterpret_cast<const uint32_t*>(record_buffer(params, plan, pass - 1)),
                           static_cast<typename MakePass::Pass::Output*>(output),
                           params.length,
                           plan.position_bits + bits_before - plan.digit_bits,
                           digit_bits,
                           plan.position_bits};
  return run_digit_pass(make_pass, static_cast<uint32_t*>(params.workspace), params, digit_bits,
                        stream);
}

cudaError_t packed_sort(const BucketSortParams& params, const Plan& plan, cudaStream_t stream) {
  const MakeBucketsToPacked first_pass{
      params.buckets,  reinterpret_cast<uint32_t*>(record_buffer(params, plan, 0)),
      params.length,   static_cast<int>(params.n_buckets),
      plan.digit_bits, plan.position_bits};
  cudaError_t error = run_digit_pass(first_pass, static_cast<uint32_t*>(params.workspace), params,
                                     plan.digit_bits, stream);
  int bits_before = plan.digit_bits;
  for (int pass = 1; pass < plan.passes && error == cudaSuccess; ++pass) {
    const int digit_bits = ceil_div(plan.bits - bits_before, plan.passes - pass);
    error = (pass + 1 < plan.passes ? packed_pass<false> : packed_pass<true>)(params, plan, pass,
                                                                              bits_before,
                                                                              digit_bits, stream);
    bits_before += digit_bits;
  }
  return error;
}

template <bool kFirst, bool kLast>
cudaError_t wide_pass(const BucketSortParams& params, const Plan& plan, int pass,
                      cudaStream_t stream) {
  using MakePass = MakeWidePass<kFirst, kLast>;
  const void* input =
      kFirst ? static_cast<const void*>(params.buckets) : record_buffer(params, plan, pass - 1);
  void* output = kLast ? static_cast<void*>(params.order) : record_buffer(params, plan, pass);
  const MakePass make_pass{static_cast<const typename MakePass::Pass::Input*>(input),
                           static_cast<typename MakePass::Pass::Output*>(output),
                           params.length,
                           static_cast<int>(params.n_buckets),
                           pass * plan.digit_bits,
                           plan.digit_bits};
  return run_digit_pass(make_pass, static_cast<uint32_t*>(params.workspace), params,
                        plan.digit_bits, stream);
}

cudaError_t wide_sort(const BucketSortParams& params, const Plan& plan, cudaStream_t stream) {
  if (plan.passes == 1) return wide_pass<true, true>(params, plan, 0, stream);
  cudaError_t error = wide_pass<true, false>(params, plan, 0, stream);
  for (int pass = 1; pass < plan.passes - 1 && error == cudaSuccess; ++pass) {
    error = wide_pass<false, false>(params, plan, pass, stream);
  }
  return error != cudaSuccess ? error
                              : wide_pass<false, true>(params, plan, plan.passes - 1, stream);
}

}  // namespace
}  // namespace sort

int64_t bucket_sort_workspace(const BucketSortParams& params) {
  sort::Plan plan{};
  if (!sort::valid(params) || params.segments == 0 || params.length == 0) return 0;
  return sort::plan_here(params, &plan) == cudaSuccess ? plan.workspace() : 0;
}

cudaError_t bucket_sort(const BucketSortParams& params, cudaStream_t stream) {
  using sort::Method;
  if (!sort::valid(params)) return cudaErrorInvalidValue;
  if (params.segments == 0 || params.length == 0) return cudaSuccess;
  sort::Plan plan{};
  cudaError_t error = sort::plan_here(params, &plan);
  if (error != cudaSuccess) return error;
  if (plan.method == Method::cluster) return sort::cluster_sort(params, plan.cluster, stream);

  for (int64_t first = 0; first < params.segments && error == cudaSuccess; first += plan.group) {
    BucketSortParams group = params;
    group.buckets += first * params.length;
    group.order += first * params.length;
    group.segments = std::min(plan.group, params.segments - first);
    switch (plan.method) {
      case Method::tiles:
        error = sort::tiles_sort(group, stream);
        break;
      case Method::packed:
        error = sort::packed_sort(group, plan, stream);
        break;
      case Method::wide:
        error = sort::wide_sort(group, plan, stream);
        break;
      default:
        error = cudaErrorInvalidValue;
    }
  }
  return error;
}

}  // namespace reformer::kernels

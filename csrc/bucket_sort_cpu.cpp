// bucket_sort on the CPU: a counting sort of each segment.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "bucket_sort_common.h"
#include "checks.h"

namespace reformer {
namespace {

void check_values(const int32_t* buckets, int64_t length, int64_t n_buckets) {
  const auto [low, high] = std::minmax_element(buckets, buckets + length);
  REFORMER_CHECK(*low >= 0 && *high < n_buckets, "bucket_sort: expected buckets in [0, ", n_buckets,
                 "), got ", *low < 0 ? *low : *high);
}

// starts: scratch of n_buckets + 1
void counting_sort(const int32_t* buckets, int64_t length, std::vector<int32_t>& starts,
                   int32_t* order) {
  std::fill(starts.begin(), starts.end(), 0);
  for (int64_t i = 0; i < length; ++i) ++starts[buckets[i] + 1];
  for (size_t b = 1; b < starts.size(); ++b) starts[b] += starts[b - 1];
  for (int64_t i = 0; i < length; ++i) order[starts[buckets[i]]++] = static_cast<int32_t>(i);
}

// (bucket, position) in one integer: its order is the stable one.
void comparison_sort(const int32_t* buckets, int64_t length, std::vector<int64_t>& keys,
                     int32_t* order) {
  for (int64_t i = 0; i < length; ++i) keys[i] = int64_t{buckets[i]} << 32 | i;
  std::sort(keys.begin(), keys.end());
  for (int64_t i = 0; i < length; ++i) order[i] = static_cast<int32_t>(keys[i]);
}

at::Tensor bucket_sort_cpu(const at::Tensor& buckets, int64_t n_buckets) {
  check_bucket_sort(buckets, n_buckets);
  const at::Tensor input = buckets.contiguous();
  at::Tensor order = bucket_sort_output(buckets);
  if (order.numel() == 0) return order;
  const int64_t length = input.size(3);
  const int32_t* from = input.const_data_ptr<int32_t>();
  int32_t* to = order.mutable_data_ptr<int32_t>();
  const bool few_buckets = n_buckets <= 4 * length + 1024;
  const int64_t grain = std::max<int64_t>(1, 16384 / length);
  at::parallel_for(0, input.numel() / length, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> starts(few_buckets ? n_buckets + 1 : 0);
    std::vector<int64_t> keys(few_buckets ? 0 : length);
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t offset = segment * length;
      check_values(from + offset, length, n_buckets);
      if (few_buckets) {
        counting_sort(from + offset, length, starts, to + offset);
      } else {
        comparison_sort(from + offset, length, keys, to + offset);
      }
    }
  });
  return order;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) { m.impl("bucket_sort", &bucket_sort_cpu); }

}  // namespace reformer

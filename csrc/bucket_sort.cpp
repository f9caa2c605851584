// bucket_sort: schema, checks, Meta, public function.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bucket_sort_common.h"
#include "checks.h"
#include "reformer.h"

namespace reformer {

void check_bucket_sort(const at::Tensor& buckets, int64_t n_buckets) {
  constexpr const char* op = "bucket_sort";
  check_rank(op, "buckets", buckets, 4, "[B, H, R, L]");
  check_dtype(op, "buckets", buckets, at::kInt);
  REFORMER_CHECK(n_buckets >= 1 && n_buckets <= (int64_t{1} << 30), op,
                 ": expected n_buckets in 1 ... 2^30, got ", n_buckets);
  REFORMER_CHECK(buckets.sym_size(3) < (int64_t{1} << 31), op,
                 ": expected less than 2^31 positions, got ", buckets.sym_sizes());
}

at::Tensor bucket_sort_output(const at::Tensor& buckets) {
  return at::empty_symint(buckets.sym_sizes(), buckets.options());
}

at::Tensor bucket_sort(const at::Tensor& buckets, int64_t n_buckets) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::bucket_sort", "")
                             .typed<decltype(bucket_sort)>();
  return op.call(buckets, n_buckets);
}

namespace {

at::Tensor bucket_sort_meta(const at::Tensor& buckets, int64_t n_buckets) {
  check_bucket_sort(buckets, n_buckets);
  return bucket_sort_output(buckets);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def("bucket_sort(Tensor buckets, int n_buckets) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, Meta, m) { m.impl("bucket_sort", &bucket_sort_meta); }

}  // namespace reformer

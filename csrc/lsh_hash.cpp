// lsh_hash: schema, checks, Meta, Autograd, public function.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "lsh_hash_common.h"
#include "reformer.h"

namespace reformer {

int64_t check_n_buckets(const char* op, at::IntArrayRef n_buckets) {
  REFORMER_CHECK(!n_buckets.empty() && n_buckets.size() <= kMaxHashFactors, op, ": expected 1 ... ",
                 kMaxHashFactors, " factors in n_buckets, got ", n_buckets);
  int64_t product = 1;
  for (const int64_t factor : n_buckets) {
    REFORMER_CHECK(factor >= 2 && factor % 2 == 0, op,
                   ": expected n_buckets to be even and >= 2, got ", n_buckets);
    REFORMER_CHECK(factor < (int64_t{1} << 30) && (product *= factor) < (int64_t{1} << 30), op,
                   ": expected the product of n_buckets to be below 2^30, got ", n_buckets);
  }
  return product;
}

void check_lsh_hash(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                    const std::optional<at::Tensor>& key_padding_mask) {
  constexpr const char* op = "lsh_hash";
  check_heads(op, "x", x);
  check_n_buckets(op, n_buckets);
  int64_t columns = 0;
  for (const int64_t factor : n_buckets) columns += factor / 2;
  check_rank(op, "rotations", rotations, 4, "[H or 1, D, R, sum(n_buckets) / 2]");
  REFORMER_CHECK((rotations.sym_size(0) == 1 || rotations.sym_size(0) == x.sym_size(1)) &&
                     rotations.sym_size(1) == x.sym_size(3) && rotations.sym_size(2) >= 1 &&
                     rotations.sym_size(3) == columns,
                 op, ": expected rotations of shape [", x.sym_size(1), " or 1, ", x.sym_size(3),
                 ", R, ", columns, "], got ", rotations.sym_sizes());
  check_float(op, "rotations", rotations);
  check_device(op, "rotations", rotations, x);
  if (key_padding_mask.has_value()) check_key_padding_mask(op, *key_padding_mask, x);
}

at::Tensor lsh_hash_output(const at::Tensor& x, const at::Tensor& rotations) {
  return at::empty_symint({x.sym_size(0), x.sym_size(1), rotations.sym_size(2), x.sym_size(2)},
                          x.options().dtype(at::kInt));
}

at::Tensor lsh_hash(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                    const std::optional<at::Tensor>& key_padding_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_hash", "")
                             .typed<decltype(lsh_hash)>();
  return op.call(x, rotations, n_buckets, key_padding_mask);
}

namespace {

at::Tensor lsh_hash_meta(const at::Tensor& x, const at::Tensor& rotations,
                         at::IntArrayRef n_buckets,
                         const std::optional<at::Tensor>& key_padding_mask) {
  check_lsh_hash(x, rotations, n_buckets, key_padding_mask);
  return lsh_hash_output(x, rotations);
}

// Buckets are integers: nothing to differentiate.
at::Tensor lsh_hash_autograd(const at::Tensor& x, const at::Tensor& rotations,
                             at::IntArrayRef n_buckets,
                             const std::optional<at::Tensor>& key_padding_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lsh_hash(x, rotations, n_buckets, key_padding_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def(
      "lsh_hash(Tensor x, Tensor rotations, int[] n_buckets, Tensor? key_padding_mask=None)"
      " -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, Meta, m) { m.impl("lsh_hash", &lsh_hash_meta); }
TORCH_LIBRARY_IMPL(reformer, Autograd, m) { m.impl("lsh_hash", &lsh_hash_autograd); }

}  // namespace reformer

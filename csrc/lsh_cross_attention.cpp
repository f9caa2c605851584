// lsh_cross_attention: queries and keys in one list, hashed and sorted together. Composed of the
// operators, which bring their own gradients.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "attention_options.h"
#include "checks.h"
#include "lsh_hash_common.h"
#include "reformer.h"

namespace reformer {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "lsh_cross_attention";

std::string dtype_name(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  REFORMER_CHECK(q.dim() == 4, kOp, ": expected q [B, H, Lq, D], got ", q.sym_sizes());
  const c10::SymInt batch = q.sym_size(0), heads = q.sym_size(1), head_dim = q.sym_size(3);
  REFORMER_CHECK(
      k.dim() == 4 && k.sym_size(0) == batch && k.sym_size(1) == heads && k.sym_size(3) == head_dim,
      kOp, ": expected k [", batch, ", ", heads, ", Lk, ", head_dim, "], got ", k.sym_sizes());
  REFORMER_CHECK(v.sym_sizes() == k.sym_sizes(), kOp, ": expected v ", k.sym_sizes(),
                 ", as k, got ", v.sym_sizes());
  // Autocast brings them to one dtype; else the concatenation would, unasked.
  const bool any_dtype = at::autocast::is_autocast_enabled(q.device().type());
  for (const auto& [name, x] : {std::pair{"k", k}, std::pair{"v", v}}) {
    REFORMER_CHECK(x.device() == q.device(), kOp, ": expected ", name, " on ", q.device(),
                   ", as q, got ", x.device());
    REFORMER_CHECK(any_dtype || x.scalar_type() == q.scalar_type(), kOp, ": expected ", name,
                   " of dtype ", dtype_name(q.scalar_type()).c_str(), ", as q, got ",
                   dtype_name(x.scalar_type()).c_str());
  }
}

// The padding mask of x, by default false.
at::Tensor padding_of(const char* name, const std::optional<at::Tensor>& mask,
                      const at::Tensor& x) {
  const c10::SymInt shape[] = {x.sym_size(0), x.sym_size(2)};
  if (!mask.has_value()) return at::zeros_symint(shape, x.options().dtype(at::kBool));
  REFORMER_CHECK(
      mask->sym_sizes() == c10::SymIntArrayRef(shape) && mask->scalar_type() == at::kBool, kOp,
      ": expected ", name, " ", c10::SymIntArrayRef(shape), " of torch.bool, got ",
      mask->sym_sizes(), " of ", dtype_name(mask->scalar_type()).c_str());
  return *mask;
}

Outputs lsh_cross_attention_composite(const AttentionOptions& given, const at::Tensor& q,
                                      const at::Tensor& k, const at::Tensor& v,
                                      const std::optional<at::Tensor>& rotations,
                                      at::IntArrayRef n_buckets,
                                      const std::optional<at::Tensor>& query_padding_mask,
                                      const std::optional<at::Tensor>& buckets, bool same_bucket) {
  check_tensors(q, k, v);
  REFORMER_CHECK(!given.causal && !given.mask_self.value_or(false), kOp,
                 ": expected neither causal nor mask_self, which are of one sequence's positions");
  const at::Tensor query_padding = padding_of("query_padding_mask", query_padding_mask, q);
  const at::Tensor key_padding = padding_of("key_padding_mask", given.key_padding_mask, k);
  const int64_t product = check_n_buckets(kOp, n_buckets);
  REFORMER_CHECK(rotations.has_value() || buckets.has_value(), kOp,
                 ": expected rotations or buckets, got neither");

  // Each row is a query and a key: a query is masked as a key, and a key's result is cut off.
  const at::Tensor joint = at::cat({q, k}, 2);
  const at::Tensor values = at::cat({at::zeros_like(q), v}, 2);
  // An operator returns no tensor that it was given.
  const at::Tensor hashed =
      buckets.has_value()
          ? buckets->clone()
          : lsh_hash(joint, *rotations, n_buckets, at::cat({query_padding, key_padding}, 1));
  AttentionOptions options = given;
  options.key_padding_mask = at::cat({at::ones_like(query_padding), key_padding}, 1);
  const auto [out, lse] =
      chunked_attention(joint, joint, values, bucket_sort(hashed, product + 1), options,
                        same_bucket ? std::optional<at::Tensor>(hashed) : std::nullopt);
  const c10::SymInt length = q.sym_size(2);
  return {out.narrow_symint(2, 0, length), lse.narrow_symint(2, 0, length), hashed};
}

constexpr auto* lsh_cross_attention_entry =
    spread_options<AttentionOptions, lsh_cross_attention_composite>;

}  // namespace

Outputs lsh_cross_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& rotations, at::IntArrayRef n_buckets,
                            const AttentionOptions& options,
                            const std::optional<at::Tensor>& query_padding_mask,
                            const std::optional<at::Tensor>& buckets, bool same_bucket) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_cross_attention", "")
                             .typed<std::remove_pointer_t<decltype(lsh_cross_attention_entry)>>();
  return call_with_options(op, options, q, k, v, rotations, n_buckets, query_padding_mask, buckets,
                           same_bucket);
}

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def(torch::schema(("lsh_cross_attention(Tensor q, Tensor k, Tensor v, Tensor? rotations, "
                       "int[] n_buckets, *, Tensor? query_padding_mask=None, Tensor? buckets=None, "
                       "bool same_bucket=False, " +
                       schema_of_options<AttentionOptions>() +
                       ") -> (Tensor out, Tensor lse, Tensor buckets)")
                          .c_str()),
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeImplicitAutograd, m) {
  m.impl("lsh_cross_attention", lsh_cross_attention_entry);
}

}  // namespace reformer

// lsh_attention: hash, sort, attend. Composed of the operators, which bring their own gradients.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "attention_options.h"
#include "checks.h"
#include "lsh_hash_common.h"
#include "reformer.h"

namespace reformer {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Outputs lsh_attention_composite(const AttentionOptions& options, const at::Tensor& qk,
                                const at::Tensor& v, const std::optional<at::Tensor>& rotations,
                                at::IntArrayRef n_buckets, const std::optional<at::Tensor>& k,
                                const std::optional<at::Tensor>& buckets, bool same_bucket) {
  constexpr const char* op = "lsh_attention";
  check_heads(op, "qk", qk);
  check_shape(op, "v", v, qk.sym_sizes(), "like qk");
  const int64_t product = check_n_buckets(op, n_buckets);
  REFORMER_CHECK(rotations.has_value() || buckets.has_value(), op,
                 ": expected rotations or buckets, got neither");

  // An operator returns no tensor that it was given.
  const auto& padding = options.key_padding_mask;
  const at::Tensor hashed =
      buckets.has_value() ? buckets->clone() : lsh_hash(qk, *rotations, n_buckets, padding);
  const at::Tensor order = bucket_sort(hashed, product + (padding.has_value() ? 1 : 0));
  const auto [out, lse] = chunked_attention(
      qk, k, v, order, options, same_bucket ? std::optional<at::Tensor>(hashed) : std::nullopt);
  return {out, lse, hashed};
}

constexpr auto* lsh_attention_entry = spread_options<AttentionOptions, lsh_attention_composite>;

}  // namespace

Outputs lsh_attention(const at::Tensor& qk, const at::Tensor& v,
                      const std::optional<at::Tensor>& rotations, at::IntArrayRef n_buckets,
                      const AttentionOptions& options, const std::optional<at::Tensor>& k,
                      const std::optional<at::Tensor>& buckets, bool same_bucket) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_attention", "")
                             .typed<std::remove_pointer_t<decltype(lsh_attention_entry)>>();
  return call_with_options(op, options, qk, v, rotations, n_buckets, k, buckets, same_bucket);
}

std::vector<int64_t> default_n_buckets(int64_t length, int64_t chunk_size) {
  REFORMER_CHECK(length >= 1 && chunk_size >= 1,
                 "default_n_buckets: expected length and chunk_size >= 1, got ", length, " and ",
                 chunk_size);
  constexpr int64_t max_factor_bits = 6;
  int64_t bits = 1;  // of the largest power of two that is at most 2 * length / chunk_size
  while (length / chunk_size >> bits != 0) ++bits;
  const int64_t n_factors = (bits + max_factor_bits - 1) / max_factor_bits;
  std::vector<int64_t> factors(n_factors, int64_t{1} << (bits / n_factors));
  for (int64_t i = n_factors - bits % n_factors; i < n_factors; ++i) factors[i] *= 2;
  return factors;
}

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def(torch::schema(("lsh_attention(Tensor qk, Tensor v, Tensor? rotations, int[] n_buckets, *, "
                       "Tensor? k=None, Tensor? buckets=None, bool same_bucket=False, " +
                       schema_of_options<AttentionOptions>() +
                       ") -> (Tensor out, Tensor lse, Tensor buckets)")
                          .c_str()),
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeImplicitAutograd, m) {
  m.impl("lsh_attention", lsh_attention_entry);
}

}  // namespace reformer

// lsh_attention: hash, sort, attend. Composed of the operators, which bring their own gradients.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "checks.h"
#include "lsh_hash_common.h"
#include "reformer.h"

namespace reformer {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Outputs lsh_attention_composite(const at::Tensor& qk, const at::Tensor& v,
                                const std::optional<at::Tensor>& rotations,
                                at::IntArrayRef n_buckets, const std::optional<at::Tensor>& k,
                                const std::optional<at::Tensor>& buckets, bool same_bucket,
                                int64_t chunk_size, int64_t look_back, int64_t look_ahead,
                                bool causal, std::optional<bool> mask_self,
                                std::optional<bool> wrap, std::optional<double> scale,
                                const std::optional<at::Tensor>& key_padding_mask,
                                bool correct_duplicates, double dropout_p,
                                const std::optional<at::Tensor>& dropout_seed) {
  constexpr const char* op = "lsh_attention";
  check_heads(op, "qk", qk);
  check_shape(op, "v", v, qk.sym_sizes(), "like qk");
  const int64_t product = check_n_buckets(op, n_buckets);
  REFORMER_CHECK(rotations.has_value() || buckets.has_value(), op,
                 ": expected rotations or buckets, got neither");

  // An operator returns no tensor that it was given.
  const at::Tensor hashed = buckets.has_value()
                                ? buckets->clone()
                                : lsh_hash(qk, *rotations, n_buckets, key_padding_mask);
  const at::Tensor order = bucket_sort(hashed, product + (key_padding_mask.has_value() ? 1 : 0));

  AttentionOptions options;
  options.chunk_size = chunk_size;
  options.look_back = look_back;
  options.look_ahead = look_ahead;
  options.causal = causal;
  options.mask_self = mask_self;
  options.wrap = wrap;
  options.scale = scale;
  options.key_padding_mask = key_padding_mask;
  options.correct_duplicates = correct_duplicates;
  options.dropout_p = dropout_p;
  options.dropout_seed = dropout_seed;
  const auto [out, lse] = chunked_attention(
      qk, k, v, order, options, same_bucket ? std::optional<at::Tensor>(hashed) : std::nullopt);
  return {out, lse, hashed};
}

}  // namespace

Outputs lsh_attention(const at::Tensor& qk, const at::Tensor& v,
                      const std::optional<at::Tensor>& rotations, at::IntArrayRef n_buckets,
                      const AttentionOptions& options, const std::optional<at::Tensor>& k,
                      const std::optional<at::Tensor>& buckets, bool same_bucket) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::lsh_attention", "")
                             .typed<decltype(lsh_attention_composite)>();
  return op.call(qk, v, rotations, n_buckets, k, buckets, same_bucket, options.chunk_size,
                 options.look_back, options.look_ahead, options.causal, options.mask_self,
                 options.wrap, options.scale, options.key_padding_mask, options.correct_duplicates,
                 options.dropout_p, options.dropout_seed);
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
  m.def(
      "lsh_attention(Tensor qk, Tensor v, Tensor? rotations, int[] n_buckets, *, Tensor? k=None, "
      "Tensor? buckets=None, bool same_bucket=False, int chunk_size=64, int look_back=1, "
      "int look_ahead=0, bool causal=False, bool? mask_self=None, bool? wrap=None, "
      "float? scale=None, Tensor? key_padding_mask=None, bool correct_duplicates=False, "
      "float dropout_p=0.0, Tensor? dropout_seed=None) "
      "-> (Tensor out, Tensor lse, Tensor buckets)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeImplicitAutograd, m) {
  m.impl("lsh_attention", &lsh_attention_composite);
}

}  // namespace reformer

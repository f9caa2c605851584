// The operators through the C++ API alone: against ATen, with gradients, and by name.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>

#include <cstdio>
#include <string>

#include "reformer.h"

namespace {

int failures = 0;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (false)

bool close(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 1e-9, 1e-9); }

at::Tensor randn(at::IntArrayRef shape) { return at::randn(shape, at::kDouble); }

// What `call` throws, up to the backtrace; empty if it returns.
template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

void test_registered_by_name() {
  for (const char* op : {"lsh_hash", "bucket_sort", "chunked_attention", "lsh_attention",
                         "lsh_cross_attention", "lsh_cache_append", "lsh_decode", "merge_attention",
                         "apply_rotary", "split_heads", "merge_heads", "next_values"}) {
    const std::string name = std::string("reformer::") + op;
    EXPECT(c10::Dispatcher::singleton().findSchema({name, ""}).has_value());
  }
}

void test_hash_and_sort() {
  const auto x = randn({2, 3, 50, 16});
  const auto rotations = randn({3, 16, 4, 5});  // 10 buckets
  const auto buckets = reformer::lsh_hash(x, rotations, {10});
  const auto projected = at::einsum("bhld,hdrn->bhrln", {x, rotations});
  EXPECT(buckets.scalar_type() == at::kInt);
  EXPECT(at::equal(buckets.to(at::kLong), at::cat({projected, -projected}, -1).argmax(-1)));

  const auto order = reformer::bucket_sort(buckets, 10);
  EXPECT(at::equal(order.to(at::kLong), at::argsort(buckets, /*stable=*/true, /*dim=*/-1)));
}

// One chunk holds everything: chunked attention is then exact attention.
void test_attention_against_aten() {
  for (const bool causal : {false, true}) {
    const auto q = randn({2, 2, 37, 8}), k = randn({2, 2, 37, 8}), v = randn({2, 2, 37, 8});
    std::vector<at::Tensor> ours, exact;
    for (const auto& t : {q, k, v}) {
      ours.push_back(t.clone().requires_grad_());
      exact.push_back(t.clone().requires_grad_());
    }
    reformer::AttentionOptions options;
    options.chunk_size = 64;
    options.causal = causal;
    const auto [out, lse] = reformer::chunked_attention(ours[0], ours[1], ours[2], {}, options);
    const auto expected =
        at::scaled_dot_product_attention(exact[0], exact[1], exact[2], {}, 0.0, causal);
    EXPECT(close(out, expected));

    const auto grad = randn({2, 2, 37, 8});
    out.backward(grad);
    expected.backward(grad);
    for (int i = 0; i < 3; ++i) EXPECT(close(ours[i].grad(), exact[i].grad()));
  }
}

void test_lsh_attention_is_its_steps() {
  const auto qk = randn({1, 2, 200, 16}), v = randn({1, 2, 200, 16});
  const auto n_buckets = reformer::default_n_buckets(200, 16);
  const int64_t n = at::tensor(n_buckets).prod().item<int64_t>();
  EXPECT(n == 16);  // the power of two at or below 2 * 200 / 16
  const auto rotations = randn({2, 16, 4, at::tensor(n_buckets).sum().item<int64_t>() / 2});
  reformer::AttentionOptions options;
  options.chunk_size = 16;
  options.causal = true;

  const auto [out, lse, buckets] = reformer::lsh_attention(qk, v, rotations, n_buckets, options);
  EXPECT(at::equal(buckets, reformer::lsh_hash(qk, rotations, n_buckets)));
  const auto [step_out, step_lse] =
      reformer::chunked_attention(qk, {}, v, reformer::bucket_sort(buckets, n), options);
  EXPECT(close(out, step_out));
  EXPECT(close(lse, step_lse));
  EXPECT(close(out.select(2, 0), v.select(2, 0)));  // nothing precedes position 0: itself, exactly
  EXPECT((lse.select(2, 0) == -1e5).all().item<bool>());

  const c10::InferenceMode inference;
  EXPECT(close(std::get<0>(reformer::lsh_attention(qk, v, rotations, n_buckets, options)), out));
}

// In one chunk every query meets every key: attention of ATen's, gradients too.
void test_lsh_cross_attention_in_one_chunk() {
  const std::vector<int64_t> n_buckets = {2};
  const auto rotations = randn({2, 8, 1, 1});
  std::vector<at::Tensor> ours, exact;
  for (const int64_t length : {11, 20, 20}) {
    const auto x = randn({1, 2, length, 8});
    ours.push_back(x.clone().requires_grad_());
    exact.push_back(x.clone().requires_grad_());
  }
  reformer::AttentionOptions options;
  options.chunk_size = 31;
  options.look_back = 0;
  const auto attend = [&] {
    return reformer::lsh_cross_attention(ours[0], ours[1], ours[2], rotations, n_buckets, options);
  };
  const auto [out, lse, buckets] = attend();
  const auto expected = at::scaled_dot_product_attention(exact[0], exact[1], exact[2]);
  EXPECT(close(out, expected));
  EXPECT(lse.sizes() == at::IntArrayRef({1, 2, 11}));
  EXPECT(at::equal(buckets.narrow(3, 0, 11), reformer::lsh_hash(ours[0], rotations, n_buckets)));
  const auto grad = randn({1, 2, 11, 8});
  out.backward(grad);
  expected.backward(grad);
  for (int i = 0; i < 3; ++i) EXPECT(close(ours[i].grad(), exact[i].grad()));

  // A padding key is met by no query.
  options.key_padding_mask = (at::arange(20) < 7).unsqueeze(0);
  const auto [seen_out, seen_lse, seen_buckets] = attend();
  EXPECT(close(seen_out, at::scaled_dot_product_attention(exact[0], exact[1].narrow(2, 7, 13),
                                                          exact[2].narrow(2, 7, 13))));
  options.causal = true;
  EXPECT(error_of(attend).find("expected neither causal nor mask_self") != std::string::npos);
}

// With one bucket that forgets nothing, decoding is exact attention to everything before.
void test_decoding_step_by_step() {
  const int64_t n = 20;
  const auto q = randn({1, 2, n, 8}), k = randn({1, 2, n, 8}), v = randn({1, 2, n, 8});
  const auto keys = at::zeros_like(k), values = at::zeros_like(v);
  const auto table = at::zeros({1, 2, 1, 1, n}, at::kInt), counts = table.select(4, 0).clone();
  const auto bucket = at::zeros({1, 2, 1, 1}, at::kInt);
  for (int64_t t = 0; t < n; ++t) {
    const auto now = [&](const at::Tensor& x) { return x.narrow(2, t, 1); };
    const auto [out, lse] =
        reformer::lsh_decode(now(q), keys, values, table, counts, bucket, now(v));
    if (t == 0) {
      EXPECT(at::equal(out, now(v)));
      EXPECT((lse == -1e5).all().item<bool>());
    } else {
      const auto expected =
          at::scaled_dot_product_attention(now(q), k.narrow(2, 0, t), v.narrow(2, 0, t));
      EXPECT(close(out, expected));
    }
    reformer::lsh_cache_append(keys, values, table, counts, now(k), now(v), bucket,
                               at::full({1}, t, at::kLong));
  }
  EXPECT(at::equal(keys, k));
}

void test_merge() {
  const auto q = randn({1, 2, 30, 8}), k = randn({1, 2, 30, 8}), v = randn({1, 2, 30, 8});
  reformer::AttentionOptions options;
  options.chunk_size = 30;
  const auto [whole, whole_lse] = reformer::chunked_attention(q, k, v, {}, options);
  // The same keys in two parts, each hiding the other by the padding mask.
  const auto first = (at::arange(30) < 11).unsqueeze(0);
  options.key_padding_mask = first;
  const auto [late, late_lse] = reformer::chunked_attention(q, k, v, {}, options);
  options.key_padding_mask = first.logical_not();
  const auto [early, early_lse] = reformer::chunked_attention(q, k, v, {}, options);
  const auto [merged, merged_lse] = reformer::merge_attention({early, late}, {early_lse, late_lse});
  EXPECT(close(merged, whole));
  EXPECT(close(merged_lse, whole_lse));
}

void test_splitting_into_heads() {
  const auto x = randn({2, 30, 3 * 4 * 8});
  const auto angles = at::randn({30, 4}, at::kFloat);
  const auto cos = at::cat({angles.cos(), angles.cos()}, -1);
  const auto sin = at::cat({-angles.sin(), angles.sin()}, -1);
  const auto heads = reformer::split_heads(x, 3, cos, sin);
  const auto given = x.view({2, 30, 3, 4, 8}).permute({2, 0, 3, 1, 4});
  EXPECT(close(heads[0], reformer::apply_rotary(given[0], cos, sin)));
  EXPECT(at::equal(heads[2], given[2]));
  const auto back = reformer::merge_heads(heads[0], heads[1], heads[2], cos, -sin);
  EXPECT(at::allclose(back, x, 1e-6, 1e-6));  // the angles are float
}

void test_errors() {
  const auto x = randn({1, 2, 30, 8});
  const auto error = error_of([&] { reformer::lsh_hash(x, randn({2, 8, 4, 4}), {7}); });
  EXPECT(error.find("lsh_hash: expected") != std::string::npos);
  const auto q = randn({1, 2, 30, 8});
  const auto rank = error_of([&] { reformer::chunked_attention(q[0], {}, q, {}); });
  EXPECT(rank.find("chunked_attention: expected q of shape [B, H, L, D], got [2, 30, 8]") !=
         std::string::npos);
}

}  // namespace

int main() {
  at::manual_seed(0);
  test_registered_by_name();
  test_hash_and_sort();
  test_attention_against_aten();
  test_lsh_attention_is_its_steps();
  test_lsh_cross_attention_in_one_chunk();
  test_decoding_step_by_step();
  test_merge();
  test_splitting_into_heads();
  test_errors();
  std::printf("%d checks failed\n", failures);
  return failures != 0;
}

// chunked_attention: schema, checks, output allocation, Meta, Autograd, Autocast, public function.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <limits>

#include "checks.h"
#include "chunked_attention_common.h"
#include "next_values_common.h"
#include "reformer.h"

namespace reformer {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "chunked_attention";

void check_indices(const char* name, const at::Tensor& indices, const at::Tensor& q,
                   const c10::SymInt& rounds) {
  check_rank(kOp, name, indices, 4, "[B, H, R, L]");
  check_shape(kOp, name, indices, {q.sym_size(0), q.sym_size(1), rounds, q.sym_size(2)},
              "(batch, heads, rounds, length)");
  check_dtype(kOp, name, indices, at::kInt);
  check_device(kOp, name, indices, q);
}

std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

at::ScalarType lse_dtype(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

void check_scale(const char* op, std::optional<double> scale, const at::Tensor& q) {
  REFORMER_CHECK(!scale.has_value() || std::isfinite(*scale), op, ": expected a finite scale, got ",
                 scale.value_or(0.0));
  const bool fits = q.scalar_type() == at::kDouble ||
                    std::abs(scale.value_or(0.0)) <= std::numeric_limits<float>::max();
  std::array<char, 32> number{};
  if (!fits) std::snprintf(number.data(), number.size(), "%g", *scale);
  REFORMER_CHECK(fits, op, ": expected a scale that is finite in float32, got ", number.data());
}

void ChunkedAttentionArgs::resolve() {
  check_heads(kOp, "q", q);
  REFORMER_CHECK(q.sym_size(2) < (int64_t{1} << 31), kOp,
                 ": expected less than 2^31 positions, got q of shape ", q.sym_sizes());
  if (q.is_cuda()) {
    REFORMER_CHECK(q.scalar_type() != at::kDouble, kOp,
                   ": expected q of dtype float32, float16 or bfloat16 on CUDA, got ",
                   q.scalar_type());
    REFORMER_CHECK(q.sym_size(3) % 8 == 0, kOp,
                   ": expected q with a head dimension that is a multiple of 8 on CUDA, got ",
                   q.sym_sizes());
  }
  if (k.has_value()) check_like(kOp, "k", *k, q, "like q");
  check_like(kOp, "v", v, q, "like q");

  c10::SymInt rounds = 1;
  if (order.has_value()) {
    check_rank(kOp, "order", *order, 4, "[B, H, R, L]");
    rounds = order->sym_size(2);
    REFORMER_CHECK(rounds >= 1, kOp, ": expected order with at least one round, got ",
                   order->sym_sizes());
    check_indices("order", *order, q, rounds);
  }
  if (buckets.has_value()) check_indices("buckets", *buckets, q, rounds);
  if (key_padding_mask.has_value()) check_key_padding_mask(kOp, *key_padding_mask, q);

  REFORMER_CHECK(chunk_size >= 1, kOp, ": expected chunk_size >= 1, got ", chunk_size);
  REFORMER_CHECK(look_back >= 0, kOp, ": expected look_back >= 0, got ", look_back);
  REFORMER_CHECK(look_ahead >= 0, kOp, ": expected look_ahead >= 0, got ", look_ahead);
  check_scale(kOp, scale, q);
  REFORMER_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, kOp, ": expected 0 <= dropout_p < 1, got ",
                 dropout_p);
  REFORMER_CHECK(dropout_seed.has_value() == (dropout_p > 0.0), kOp,
                 ": expected a dropout_seed exactly if dropout_p > 0, got ",
                 dropout_seed.has_value() ? "one" : "none", " with dropout_p = ", dropout_p);
  if (dropout_seed.has_value()) {
    check_dtype(kOp, "dropout_seed", *dropout_seed, at::kLong);
    REFORMER_CHECK(dropout_seed->sym_numel() == 1, kOp,
                   ": expected dropout_seed with one element, got shape ",
                   dropout_seed->sym_sizes());
    check_device(kOp, "dropout_seed", *dropout_seed, q);
  }

  mask_self = mask_self.value_or(shared_qk());
  wrap = wrap.value_or(order.has_value());
  REFORMER_CHECK(!value_mix.has_value(), kOp, "_backward: expected no value_mix, got one");
  if (own_values.has_value()) {
    REFORMER_CHECK(*mask_self, kOp,
                   ": expected own_values only with mask_self, under which a query may meet only "
                   "itself, got mask_self false");
    check_like(kOp, "own_values", *own_values, q, "like q");
  }
}

void ChunkedAttentionArgs::mix_values() {
  if (!value_mix.has_value()) return;
  REFORMER_CHECK(
      mask_self.value_or(shared_qk()), kOp,
      ": expected value_mix only with mask_self, under which no query attends to itself, "
      "got mask_self false");
  REFORMER_CHECK(!own_values.has_value(), kOp,
                 ": expected value_mix without own_values, which are then v, got both");
  own_values = v;
  v = next_values(v, *value_mix, key_padding_mask, causal);
  value_mix.reset();
}

void ChunkedAttentionResults::check(const ChunkedAttentionArgs& args) const {
  constexpr const char* op = "chunked_attention_backward";
  const at::Tensor& q = args.q;
  const auto check = [&](const char* name, const at::Tensor& x, c10::SymIntArrayRef shape,
                         at::ScalarType dtype) {
    check_shape(op, name, x, shape, "to agree with q");
    check_dtype(op, name, x, dtype);
    check_device(op, name, x, q);
  };
  const c10::SymIntArrayRef rows = q.sym_sizes().slice(0, 3);
  check("grad_out", grad_out, q.sym_sizes(), q.scalar_type());
  check("out", out, q.sym_sizes(), q.scalar_type());
  check("lse", lse, rows, lse_dtype(q));
  if (grad_lse.has_value()) check("grad_lse", *grad_lse, rows, lse_dtype(q));
}

at::Tensor chunked_attention_output(const at::Tensor& q) {
  const c10::SymInt batch = q.sym_size(0), heads = q.sym_size(1), length = q.sym_size(2),
                    head_dim = q.sym_size(3);
  if (q.sym_stride(1) < q.sym_stride(2)) {  // a (B, L, H, D) projection, transposed
    return at::empty_strided_symint(
        q.sym_sizes(), {length * heads * head_dim, head_dim, heads * head_dim, 1}, q.options());
  }
  return at::empty_symint(q.sym_sizes(), q.options());
}

at::Tensor chunked_attention_lse(const at::Tensor& q) {
  return at::empty_symint(q.sym_sizes().slice(0, 3), q.options().dtype(lse_dtype(q)));
}

Gradients chunked_attention_grads(const ChunkedAttentionArgs& args) {
  return {chunked_attention_output(args.q),
          args.shared_qk() ? at::empty({0}, args.q.options()) : chunked_attention_output(*args.k),
          chunked_attention_output(args.v)};
}

namespace {

// Through the dispatcher.
Outputs call(const ChunkedAttentionArgs& args) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("reformer::chunked_attention", "")
          .typed<std::remove_pointer_t<decltype(chunked_attention_entry<call>)>>();
  const ChunkedAttentionOptions& options = args;
  return call_with_options(op, options, args.q, args.k, args.v, args.order);
}

Gradients call(const ChunkedAttentionArgs& args, const ChunkedAttentionResults& results) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("reformer::chunked_attention_backward", "")
          .typed<std::remove_pointer_t<decltype(chunked_attention_backward_entry<call>)>>();
  const ChunkedAttentionOptions& options = args;
  return call_with_options(op, options, results.grad_out, results.grad_lse, args.q, args.k, args.v,
                           args.order, results.out, results.lse);
}

Outputs chunked_attention_meta(const ChunkedAttentionArgs& args) {
  return {chunked_attention_output(args.q), chunked_attention_lse(args.q)};
}

Gradients chunked_attention_backward_meta(const ChunkedAttentionArgs& args,
                                          const ChunkedAttentionResults&) {
  return chunked_attention_grads(args);
}

// Options that are tensors are saved with the others, behind those that `saved` already holds.
void save(const ChunkedAttentionOptions& options, torch::autograd::AutogradContext* ctx,
          torch::autograd::variable_list& saved) {
  for_each_option<ChunkedAttentionOptions>([&](const auto& option) {
    const auto& value = options.*option.member;
    if constexpr (is_tensor_option<decltype(value)>) {
      saved.push_back(value.value_or(at::Tensor()));
    } else {
      ctx->saved_data[option.name] = value;
    }
  });
}

void load(ChunkedAttentionOptions& options, torch::autograd::AutogradContext* ctx,
          const at::Tensor* saved) {
  for_each_option<ChunkedAttentionOptions>([&](const auto& option) {
    auto& value = options.*option.member;
    if constexpr (is_tensor_option<decltype(value)>) {
      value = optional(*saved++);
    } else {
      value = ctx->saved_data[option.name].template to<std::decay_t<decltype(value)>>();
    }
  });
}

struct ChunkedAttentionFunction : torch::autograd::Function<ChunkedAttentionFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd

  // What is differentiable is an argument of its own: autograd looks for its inputs among them.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& q,
                                                const std::optional<at::Tensor>& k,
                                                const at::Tensor& /*v*/,
                                                const std::optional<at::Tensor>& /*own_values*/,
                                                const std::optional<at::Tensor>& value_mix,
                                                ChunkedAttentionArgs args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    args.mix_values();
    const auto [out, lse] = call(args);
    ctx->set_materialize_grads(false);
    torch::autograd::variable_list saved{
        q,   k.value_or(at::Tensor()),        args.v, args.order.value_or(at::Tensor()), out,
        lse, value_mix.value_or(at::Tensor())};
    save(args, ctx, saved);
    ctx->save_for_backward(std::move(saved));
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return {{}, {}, {}, {}, {}, {}};
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    ChunkedAttentionArgs args{{}, saved[0], saved[2], optional(saved[1]), optional(saved[3])};
    load(args, ctx, &saved[7]);
    ChunkedAttentionResults results{grads[0], optional(grads[1]), saved[4], saved[5]};
    if (!results.grad_out.defined()) {  // only lse was used: one zero, expanded
      results.grad_out =
          at::zeros({1, 1, 1, 1}, args.q.options()).expand_symint(args.q.sym_sizes());
    }
    auto [grad_q, grad_k, grad_v] = call(args, results);
    at::Tensor grad_own_values, grad_value_mix;
    if (saved[6].defined()) {  // own_values is v: its gradient is added on the way
      std::tie(grad_v, grad_value_mix) =
          next_values_backward(grad_v, *args.own_values, saved[6], args.key_padding_mask,
                               args.causal, results.grad_out, results.lse);
    } else if (args.own_values.has_value()) {
      const at::Tensor self_only = (results.lse == kSelfOnlyLse).unsqueeze(-1);
      grad_own_values = at::where(self_only, results.grad_out, 0.0);
    }
    if (args.shared_qk()) grad_k.reset();
    return {grad_q, grad_k, grad_v, grad_own_values, grad_value_mix, {}};
  }
};

Outputs chunked_attention_autograd(const ChunkedAttentionOptions& options, const at::Tensor& q,
                                   const std::optional<at::Tensor>& k, const at::Tensor& v,
                                   const std::optional<at::Tensor>& order) {
  const auto outputs =
      ChunkedAttentionFunction::apply(q, k, v, options.own_values, options.value_mix,
                                      ChunkedAttentionArgs{options, q, v, k, order});
  return {outputs[0], outputs[1]};
}

// q, k and values in autocast's dtype; masks, indices, seed and value_mix as they are.
template <c10::DispatchKey autocast_key, at::DeviceType device_type>
Outputs chunked_attention_autocast(const ChunkedAttentionOptions& options, const at::Tensor& q,
                                   const std::optional<at::Tensor>& k, const at::Tensor& v,
                                   const std::optional<at::Tensor>& order) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device_type);
  const auto cast = [&](const at::Tensor& x) {
    return at::autocast::cached_cast(dtype, x, device_type);
  };
  const auto cast_if_given = [&](const std::optional<at::Tensor>& x) {
    return x.has_value() ? std::optional<at::Tensor>(cast(*x)) : std::nullopt;
  };
  ChunkedAttentionArgs args{options, cast(q), cast(v), cast_if_given(k), order};
  args.own_values = cast_if_given(options.own_values);
  return call(args);
}

}  // namespace

Outputs chunked_attention(const at::Tensor& q, const std::optional<at::Tensor>& k,
                          const at::Tensor& v, const std::optional<at::Tensor>& order,
                          const AttentionOptions& options,
                          const std::optional<at::Tensor>& buckets) {
  return call({{options, buckets}, q, v, k, order});
}

namespace {
std::atomic<int64_t> workspace_limit_bytes{int64_t{5} << 28};
}  // namespace

void set_workspace_limit(int64_t bytes) {
  REFORMER_CHECK(bytes >= 0, "set_workspace_limit: expected bytes >= 0, got ", bytes);
  workspace_limit_bytes = bytes;
}

int64_t workspace_limit() { return workspace_limit_bytes; }

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  const std::string options = schema_of_options<ChunkedAttentionOptions>() + ")";
  m.def(torch::schema(("chunked_attention(Tensor q, Tensor? k, Tensor v, Tensor? order=None, *, " +
                       options + " -> (Tensor out, Tensor lse)")
                          .c_str()),
        {at::Tag::pt2_compliant_tag});
  m.def(torch::schema(("chunked_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, "
                       "Tensor? k, Tensor v, Tensor? order, Tensor out, Tensor lse, *, " +
                       options + " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)")
                          .c_str()),
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(reformer, Meta, m) {
  m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<chunked_attention_meta>));
  m.impl("chunked_attention_backward",
         TORCH_FN(chunked_attention_backward_entry<chunked_attention_backward_meta>));
}

TORCH_LIBRARY_IMPL(reformer, Autograd, m) {
  m.impl("chunked_attention",
         TORCH_FN((spread_options<ChunkedAttentionOptions, chunked_attention_autograd>)));
  m.impl("chunked_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(reformer, AutocastCPU, m) {
  m.impl("chunked_attention",
         TORCH_FN((
             spread_options<ChunkedAttentionOptions,
                            chunked_attention_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>>)));
}

TORCH_LIBRARY_IMPL(reformer, AutocastCUDA, m) {
  m.impl("chunked_attention",
         TORCH_FN(
             (spread_options<ChunkedAttentionOptions,
                             chunked_attention_autocast<c10::DispatchKey::Autocast, at::kCUDA>>)));
}

}  // namespace reformer

// next_values: schema, checks, Meta, Autograd, Autocast, public function.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "chunked_attention_common.h"
#include "next_values_common.h"
#include "reformer.h"

namespace reformer {
namespace {

constexpr const char* kOp = "next_values";

}  // namespace

void check_next_values(const at::Tensor& v, const at::Tensor& value_mix,
                       const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  check_heads(kOp, "v", v);
  if (v.is_cuda()) {
    REFORMER_CHECK(v.scalar_type() != at::kDouble, kOp,
                   ": expected v of dtype float32, float16 or bfloat16 on CUDA, got ",
                   v.scalar_type());
    REFORMER_CHECK(v.sym_size(3) % 8 == 0, kOp,
                   ": expected v with a head dimension that is a multiple of 8 on CUDA, got ",
                   v.sym_sizes());
  }
  check_rank(kOp, "value_mix", value_mix, 2, "[2 or 3, H]");
  check_shape(kOp, "value_mix", value_mix, {causal ? 2 : 3, v.sym_size(1)},
              causal ? "(own and next, heads), as causal is true"
                     : "(previous, own and next, heads), as causal is false");
  check_float(kOp, "value_mix", value_mix);
  check_device(kOp, "value_mix", value_mix, v);
  if (key_padding_mask.has_value()) check_key_padding_mask(kOp, *key_padding_mask, v);
}

void check_next_values_backward(const at::Tensor& grad, const at::Tensor& v,
                                const at::Tensor& value_mix,
                                const std::optional<at::Tensor>& key_padding_mask, bool causal,
                                const std::optional<at::Tensor>& own_grad,
                                const std::optional<at::Tensor>& lse) {
  constexpr const char* op = "next_values_backward";
  check_next_values(v, value_mix, key_padding_mask, causal);
  check_like(op, "grad", grad, v, "like v");
  REFORMER_CHECK(own_grad.has_value() == lse.has_value(), op,
                 ": expected own_grad and lse together, got ",
                 lse.has_value() ? "lse alone" : "own_grad alone");
  if (!lse.has_value()) return;
  check_like(op, "own_grad", *own_grad, v, "like v");
  check_shape(op, "lse", *lse, v.sym_sizes().slice(0, 3), "(batch, heads, length)");
  check_dtype(op, "lse", *lse, v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  check_device(op, "lse", *lse, v);
}

at::Tensor wide_value_mix(const at::Tensor& v, const at::Tensor& value_mix) {
  return value_mix.to(v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

at::Tensor next_values(const at::Tensor& v, const at::Tensor& value_mix,
                       const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::next_values", "")
                             .typed<decltype(next_values)>();
  return op.call(v, value_mix, key_padding_mask, causal);
}

std::tuple<at::Tensor, at::Tensor> next_values_backward(
    const at::Tensor& grad, const at::Tensor& v, const at::Tensor& value_mix,
    const std::optional<at::Tensor>& key_padding_mask, bool causal,
    const std::optional<at::Tensor>& own_grad, const std::optional<at::Tensor>& lse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::next_values_backward", "")
                             .typed<decltype(next_values_backward)>();
  return op.call(grad, v, value_mix, key_padding_mask, causal, own_grad, lse);
}

namespace {

at::Tensor next_values_meta(const at::Tensor& v, const at::Tensor& value_mix,
                            const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  check_next_values(v, value_mix, key_padding_mask, causal);
  return chunked_attention_output(v);
}

std::tuple<at::Tensor, at::Tensor> next_values_backward_meta(
    const at::Tensor& grad, const at::Tensor& v, const at::Tensor& value_mix,
    const std::optional<at::Tensor>& key_padding_mask, bool causal,
    const std::optional<at::Tensor>& own_grad, const std::optional<at::Tensor>& lse) {
  check_next_values_backward(grad, v, value_mix, key_padding_mask, causal, own_grad, lse);
  return {chunked_attention_output(v),
          at::empty_symint(value_mix.sym_sizes(), value_mix.options())};
}

struct NextValuesFunction : torch::autograd::Function<NextValuesFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& v,
                            const at::Tensor& value_mix,
                            const std::optional<at::Tensor>& key_padding_mask, bool causal) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({v, value_mix, key_padding_mask.value_or(at::Tensor())});
    ctx->saved_data["causal"] = causal;
    return next_values(v, value_mix, key_padding_mask, causal);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const auto mask = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    auto [grad_v, grad_value_mix] = next_values_backward(grads[0], saved[0], saved[1], mask,
                                                         ctx->saved_data["causal"].toBool());
    return {grad_v, grad_value_mix, {}, {}};
  }
};

at::Tensor next_values_autograd(const at::Tensor& v, const at::Tensor& value_mix,
                                const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  return NextValuesFunction::apply(v, value_mix, key_padding_mask, causal);
}

// v in autocast's dtype; value_mix, which is computed with in float32, as it is.
template <c10::DispatchKey autocast_key, at::DeviceType device_type>
at::Tensor next_values_autocast(const at::Tensor& v, const at::Tensor& value_mix,
                                const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device_type);
  return next_values(at::autocast::cached_cast(dtype, v, device_type), value_mix, key_padding_mask,
                     causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def(
      "next_values(Tensor v, Tensor value_mix, Tensor? key_padding_mask=None, *, "
      "bool causal=True) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "next_values_backward(Tensor grad, Tensor v, Tensor value_mix, "
      "Tensor? key_padding_mask=None, *, bool causal=True, Tensor? own_grad=None, "
      "Tensor? lse=None) -> (Tensor grad_v, Tensor grad_value_mix)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(reformer, Meta, m) {
  m.impl("next_values", &next_values_meta);
  m.impl("next_values_backward", &next_values_backward_meta);
}

TORCH_LIBRARY_IMPL(reformer, Autograd, m) {
  m.impl("next_values", &next_values_autograd);
  m.impl("next_values_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(reformer, AutocastCPU, m) {
  m.impl("next_values", TORCH_FN((next_values_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>)));
}

TORCH_LIBRARY_IMPL(reformer, AutocastCUDA, m) {
  m.impl("next_values", TORCH_FN((next_values_autocast<c10::DispatchKey::Autocast, at::kCUDA>)));
}

}  // namespace reformer

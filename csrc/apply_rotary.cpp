// apply_rotary: schema, checks, Meta, Autograd, public function, and a kernel composed of ATen
// operators, for devices without their own and for what CUDA's does not take.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "apply_rotary_common.h"
#include "checks.h"
#include "reformer.h"

namespace reformer {

void check_rotary_factors(const char* op, const at::Tensor& cos, const at::Tensor& sin,
                          const at::Tensor& x, const c10::SymInt& batch, const c10::SymInt& length,
                          const c10::SymInt& head_dim) {
  for (const auto& [name, factors] : {std::pair{"cos", cos}, std::pair{"sin", sin}}) {
    if (factors.dim() == 4) {
      check_shape(op, name, factors, {batch, 1, length, head_dim},
                  "(batch, 1, length, head dimension)");
    } else {
      check_shape(op, name, factors, {length, head_dim}, "(length, head dimension)");
    }
    check_dtype(op, name, factors, at::kFloat);
    check_device(op, name, factors, x);
  }
}

void check_apply_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  constexpr const char* op = "apply_rotary";
  REFORMER_CHECK(x.dim() == 4 || x.dim() == 5, op,
                 ": expected x of shape [B, H, L, D] or [N, B, H, L, D], got ", x.sym_sizes());
  check_float(op, "x", x);
  REFORMER_CHECK(x.sym_size(-1) >= 2 && x.sym_size(-1) % 2 == 0, op,
                 ": expected x with an even head dimension, got ", x.sym_sizes());
  check_rotary_factors(op, cos, sin, x, x.sym_size(-4), x.sym_size(-2), x.sym_size(-1));
}

void turn_heads_composite(const at::Tensor& from, const at::Tensor& to, const at::Tensor& cos,
                          const at::Tensor& sin) {
  const at::Tensor partners = from.roll(from.size(-1) / 2, -1);
  to.copy_((from * cos).addcmul_(partners, sin));
}

at::Tensor apply_rotary_composite(const at::Tensor& x, const at::Tensor& cos,
                                  const at::Tensor& sin) {
  check_apply_rotary(x, cos, sin);
  const at::Tensor out = at::empty_like(x);
  turn_heads_composite(x, out, cos, sin);
  return out;
}

at::Tensor apply_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::apply_rotary", "")
                             .typed<decltype(apply_rotary)>();
  return op.call(x, cos, sin);
}

namespace {

at::Tensor apply_rotary_meta(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  check_apply_rotary(x, cos, sin);
  return at::empty_like(x);
}

// The turn back is a turn by the opposite angles.
struct ApplyRotaryFunction : torch::autograd::Function<ApplyRotaryFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& cos, const at::Tensor& sin) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    return apply_rotary(x, cos, sin);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    return {apply_rotary(grads[0], saved[0], saved[1].neg()), {}, {}};
  }
};

at::Tensor apply_rotary_autograd(const at::Tensor& x, const at::Tensor& cos,
                                 const at::Tensor& sin) {
  return ApplyRotaryFunction::apply(x, cos, sin);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def("apply_rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeExplicitAutograd, m) {
  m.impl("apply_rotary", &apply_rotary_composite);
}
TORCH_LIBRARY_IMPL(reformer, Meta, m) { m.impl("apply_rotary", &apply_rotary_meta); }
TORCH_LIBRARY_IMPL(reformer, Autograd, m) { m.impl("apply_rotary", &apply_rotary_autograd); }

}  // namespace reformer

// split_heads and merge_heads: schemas, checks, Meta, Autograd, public functions, and kernels
// composed of ATen operators, for devices without their own and for what CUDA's do not take. Each
// is the other's derivative, with the opposite angles.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "apply_rotary_common.h"
#include "checks.h"
#include "reformer.h"
#include "split_heads_common.h"

namespace reformer {
namespace {

// D, which the factors alone tell.
c10::SymInt head_dim_of(const char* op, const at::Tensor& cos) {
  REFORMER_CHECK(cos.dim() == 2 || cos.dim() == 4, op,
                 ": expected cos of shape [L, D] or [B, 1, L, D], got ", cos.sym_sizes());
  const c10::SymInt head_dim = cos.sym_size(-1);
  REFORMER_CHECK(head_dim >= 2 && head_dim % 2 == 0, op,
                 ": expected cos with an even head dimension, got ", cos.sym_sizes());
  return head_dim;
}

int64_t parts_of(const std::optional<at::Tensor>& k) { return k.has_value() ? 3 : 2; }

}  // namespace

void check_split_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                       const at::Tensor& sin) {
  constexpr const char* op = "split_heads";
  check_rank(op, "x", x, 3, "[B, L, parts * H * D]");
  check_float(op, "x", x);
  REFORMER_CHECK(parts == 2 || parts == 3, op, ": expected parts of 2 or 3, got ", parts);
  const c10::SymInt head_dim = head_dim_of(op, cos), unit = head_dim * parts;
  check_rotary_factors(op, cos, sin, x, x.sym_size(0), x.sym_size(1), head_dim);
  REFORMER_CHECK(x.sym_size(2) >= unit && x.sym_size(2) % unit == 0, op,
                 ": expected x with rows of a multiple of parts * D = ", unit, ", got ",
                 x.sym_sizes());
}

void check_merge_heads(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
                       const at::Tensor& cos, const at::Tensor& sin) {
  constexpr const char* op = "merge_heads";
  check_rank(op, "q", q, 4, "[B, H, L, D]");
  check_float(op, "q", q);
  if (k.has_value()) check_like(op, "k", *k, q, "like q");
  check_like(op, "v", v, q, "like q");
  const c10::SymInt head_dim = head_dim_of(op, cos);
  check_rotary_factors(op, cos, sin, q, q.sym_size(0), q.sym_size(2), head_dim);
  REFORMER_CHECK(q.sym_size(3) == head_dim, op, ": expected q with the head dimension ", head_dim,
                 " of cos, got ", q.sym_sizes());
}

std::vector<at::Tensor> heads_like(const at::Tensor& x, int64_t parts, const at::Tensor& cos) {
  const c10::SymInt head_dim = cos.sym_size(-1), heads = x.sym_size(2) / (head_dim * parts);
  std::vector<at::Tensor> result;
  for (int64_t part = 0; part < parts; ++part) {
    result.push_back(at::empty_symint({x.sym_size(0), x.sym_size(1), heads, head_dim}, x.options())
                         .transpose(1, 2));
  }
  return result;
}

at::Tensor projection_like(const at::Tensor& v, int64_t parts) {
  return at::empty_symint({v.sym_size(0), v.sym_size(2), v.sym_size(1) * v.sym_size(3) * parts},
                          v.options());
}

at::Tensor view_as_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos) {
  return x.unflatten(2, {parts, -1, cos.size(-1)}).permute({2, 0, 3, 1, 4});
}

std::vector<at::Tensor> split_heads_composite(const at::Tensor& x, int64_t parts,
                                              const at::Tensor& cos, const at::Tensor& sin) {
  check_split_heads(x, parts, cos, sin);
  std::vector<at::Tensor> out = heads_like(x, parts, cos);
  const at::Tensor heads = view_as_heads(x, parts, cos);
  for (int64_t part = 0; part < parts - 1; ++part) {
    turn_heads_composite(heads[part], out[part], cos, sin);
  }
  out.back().copy_(heads[-1]);
  return out;
}

at::Tensor merge_heads_composite(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                 const at::Tensor& v, const at::Tensor& cos,
                                 const at::Tensor& sin) {
  check_merge_heads(q, k, v, cos, sin);
  at::Tensor out = projection_like(v, parts_of(k));
  const at::Tensor heads = view_as_heads(out, parts_of(k), cos);
  turn_heads_composite(q, heads[0], cos, sin);
  if (k.has_value()) turn_heads_composite(*k, heads[1], cos, sin);
  heads[-1].copy_(v);
  return out;
}

std::vector<at::Tensor> split_heads(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                                    const at::Tensor& sin) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::split_heads", "")
                             .typed<decltype(split_heads)>();
  return op.call(x, parts, cos, sin);
}

at::Tensor merge_heads(const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& v,
                       const at::Tensor& cos, const at::Tensor& sin) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::merge_heads", "")
                             .typed<decltype(merge_heads)>();
  return op.call(q, k, v, cos, sin);
}

namespace {

std::vector<at::Tensor> split_heads_meta(const at::Tensor& x, int64_t parts, const at::Tensor& cos,
                                         const at::Tensor& sin) {
  check_split_heads(x, parts, cos, sin);
  return heads_like(x, parts, cos);
}

at::Tensor merge_heads_meta(const at::Tensor& q, const std::optional<at::Tensor>& k,
                            const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin) {
  check_merge_heads(q, k, v, cos, sin);
  return projection_like(v, parts_of(k));
}

struct SplitHeadsFunction : torch::autograd::Function<SplitHeadsFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& x, int64_t parts,
                                                const at::Tensor& cos, const at::Tensor& sin) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    return split_heads(x, parts, cos, sin);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const auto grad_k = grads.size() == 3 ? std::optional(grads[1]) : std::nullopt;
    return {merge_heads(grads.front(), grad_k, grads.back(), saved[0], saved[1].neg()), {}, {}, {}};
  }
};

struct MergeHeadsFunction : torch::autograd::Function<MergeHeadsFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q,
                            const std::optional<at::Tensor>& k, const at::Tensor& v,
                            const at::Tensor& cos, const at::Tensor& sin) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["parts"] = parts_of(k);
    return merge_heads(q, k, v, cos, sin);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const int64_t parts = ctx->saved_data["parts"].toInt();
    const auto heads = split_heads(grads[0], parts, saved[0], saved[1].neg());
    return {heads.front(), parts == 3 ? heads[1] : at::Tensor(), heads.back(), {}, {}};
  }
};

std::vector<at::Tensor> split_heads_autograd(const at::Tensor& x, int64_t parts,
                                             const at::Tensor& cos, const at::Tensor& sin) {
  return SplitHeadsFunction::apply(x, parts, cos, sin);
}

at::Tensor merge_heads_autograd(const at::Tensor& q, const std::optional<at::Tensor>& k,
                                const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin) {
  return MergeHeadsFunction::apply(q, k, v, cos, sin);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def("split_heads(Tensor x, int parts, Tensor cos, Tensor sin) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
  m.def("merge_heads(Tensor q, Tensor? k, Tensor v, Tensor cos, Tensor sin) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeExplicitAutograd, m) {
  m.impl("split_heads", &split_heads_composite);
  m.impl("merge_heads", &merge_heads_composite);
}
TORCH_LIBRARY_IMPL(reformer, Meta, m) {
  m.impl("split_heads", &split_heads_meta);
  m.impl("merge_heads", &merge_heads_meta);
}
TORCH_LIBRARY_IMPL(reformer, Autograd, m) {
  m.impl("split_heads", &split_heads_autograd);
  m.impl("merge_heads", &merge_heads_autograd);
}

}  // namespace reformer

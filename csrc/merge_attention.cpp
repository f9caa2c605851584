// merge_attention: attentions of the same queries over disjoint key sets, joined by their
// log-sum-exp. Composed of ATen operators, which differentiate it.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "reformer.h"

namespace reformer {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::tuple<at::Tensor, at::Tensor> merge_attention_composite(at::TensorList outs,
                                                             at::TensorList lses) {
  constexpr const char* op = "merge_attention";
  REFORMER_CHECK(!outs.empty() && outs.size() == lses.size(), op,
                 ": expected as many lses as outs and at least one, got ", outs.size(),
                 " outs and ", lses.size(), " lses");
  check_rank(op, "outs", outs[0], 4, "[B, H, L, D]");
  check_float(op, "outs", outs[0]);
  check_float(op, "lses", lses[0]);
  for (size_t i = 0; i < outs.size(); ++i) {
    check_shape(op, "outs", outs[i], outs[0].sym_sizes(), "like the first");
    check_dtype(op, "outs", outs[i], outs[0].scalar_type());
    check_shape(op, "lses", lses[i], outs[0].sym_sizes().slice(0, 3), "(batch, heads, length)");
    check_dtype(op, "lses", lses[i], lses[0].scalar_type());
    check_device(op, "outs", outs[i], outs[0]);
    check_device(op, "lses", lses[i], outs[0]);
  }

  // The peak is a shift that cancels, hence detached; where no part has a key it may be anything
  // finite.
  const at::Tensor stacked = at::stack(lses);  // [parts, B, H, L]
  at::Tensor peak = stacked.detach().amax(0);
  peak = peak.masked_fill(peak == -kInfinity, 0.0);
  const at::Tensor weights = (stacked - peak).exp();
  at::Tensor total = weights.sum(0);
  const at::Tensor nothing = total == 0;
  total = total.masked_fill(nothing, 1.0);
  const at::Tensor shares = (weights / total).unsqueeze(-1);

  at::Tensor out = shares[0] * outs[0];
  for (size_t i = 1; i < outs.size(); ++i) out = out + shares[i] * outs[i];
  return {out.to(outs[0].scalar_type()), (total.log() + peak).masked_fill(nothing, -kInfinity)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outs, at::TensorList lses) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reformer::merge_attention", "")
                             .typed<decltype(merge_attention)>();
  return op.call(outs, lses);
}

TORCH_LIBRARY_FRAGMENT(reformer, m) {
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(reformer, CompositeImplicitAutograd, m) {
  m.impl("merge_attention", &merge_attention_composite);
}

}  // namespace reformer

// chunked_attention on CUDA: readies the tensors for the kernels, launches, registers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "chunked_attention_common.h"
#include "kernel_tensors.h"
#include "kernels/chunked_attention.h"
#include "reformer.h"

namespace reformer {
namespace {

using kernels::ChunkedAttentionBackwardParams;
using kernels::ChunkedAttentionParams;
using kernels::HeadsView;

// What the checks shared with the CPU and with tracing leave open.
void check_length(const char* op, const ChunkedAttentionArgs& args) {
  REFORMER_CHECK(args.length() <= (int64_t{1} << 30) / args.rounds(), op,
                 ": expected at most 2^30 positions over all rounds on CUDA, got ", args.length(),
                 " positions in ", args.rounds(), " rounds");
}

void make_contiguous(std::optional<at::Tensor>& x) {
  if (x.has_value()) x = x->contiguous();
}

ChunkedAttentionArgs kernel_ready(ChunkedAttentionArgs args) {
  args.q = with_aligned_rows(args.q);
  args.v = with_aligned_rows(args.v);
  if (args.k.has_value()) args.k = with_aligned_rows(*args.k);
  if (args.own_values.has_value()) args.own_values = with_aligned_rows(*args.own_values);
  for (auto* x : {&args.order, &args.key_padding_mask, &args.buckets}) make_contiguous(*x);
  return args;
}

HeadsView view_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<T>() : nullptr;
}

// Everything but the results. Keeps no tensor alive: args must outlive the launch.
void fill(ChunkedAttentionParams& params, const ChunkedAttentionArgs& args) {
  params.q = view_of(args.q);
  if (!args.shared_qk()) params.k = view_of(*args.k);
  params.v = view_of(args.v);
  params.own_values = view_of(args.own_values.value_or(args.v));
  params.order = data_of<int32_t>(args.order);
  params.buckets = data_of<int32_t>(args.buckets);
  params.key_padding_mask = data_of<bool>(args.key_padding_mask);
  params.dropout_seed = data_of<int64_t>(args.dropout_seed);
  params.dtype = kernel_dtype(args.q).value();
  params.batch = args.batch();
  params.heads = args.heads();
  params.length = args.length();
  params.head_dim = args.head_dim();
  params.rounds = args.rounds();
  params.chunk_size = args.chunk_size;
  params.look_back = args.look_back;
  params.look_ahead = args.look_ahead;
  params.causal = args.causal;
  params.mask_self = *args.mask_self;
  params.wrap = *args.wrap;
  params.correct_duplicates = args.correct_duplicates;
  params.scale = static_cast<float>(args.resolved_scale());
  params.dropout_p = args.dropout_p;
  params.workspace_cap = workspace_limit();
}

at::Tensor allocate_workspace(const at::Tensor& q, int64_t bytes) {
  return at::empty({bytes}, q.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> chunked_attention_cuda(const ChunkedAttentionArgs& given) {
  const c10::cuda::CUDAGuard guard(given.q.device());
  check_length("chunked_attention", given);
  at::Tensor out = chunked_attention_output(given.q), lse = chunked_attention_lse(given.q);
  if (out.numel() == 0) return {out, lse};

  const ChunkedAttentionArgs args = kernel_ready(given);
  ChunkedAttentionParams params = {};
  fill(params, args);
  params.out = view_of(out);
  params.lse = lse.mutable_data_ptr<float>();
  const at::Tensor workspace =
      allocate_workspace(out, kernels::chunked_attention_forward_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(
      kernels::chunked_attention_forward(params, c10::cuda::getCurrentCUDAStream().stream()));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_backward_cuda(
    const ChunkedAttentionArgs& given, const ChunkedAttentionResults& results) {
  const c10::cuda::CUDAGuard guard(given.q.device());
  check_length("chunked_attention_backward", given);
  auto grads = chunked_attention_grads(given);
  const auto& [grad_q, grad_k, grad_v] = grads;
  if (grad_q.numel() == 0) return grads;

  const ChunkedAttentionArgs args = kernel_ready(given);
  const at::Tensor out = with_aligned_rows(results.out),
                   grad_out = with_aligned_rows(results.grad_out);
  const at::Tensor lse = results.lse.contiguous();
  std::optional<at::Tensor> grad_lse = results.grad_lse;
  make_contiguous(grad_lse);
  ChunkedAttentionBackwardParams params = {};
  fill(params, args);
  params.out = view_of(out);
  params.lse = const_cast<float*>(lse.const_data_ptr<float>());  // only read
  params.grad_out = view_of(grad_out);
  params.grad_lse = data_of<float>(grad_lse);
  params.grad_q = view_of(grad_q);
  if (!args.shared_qk()) params.grad_k = view_of(grad_k);
  params.grad_v = view_of(grad_v);
  params.own_values_apart = args.own_values.has_value();
  const at::Tensor workspace =
      allocate_workspace(grad_q, kernels::chunked_attention_backward_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(
      kernels::chunked_attention_backward(params, c10::cuda::getCurrentCUDAStream().stream()));
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) {
  m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<chunked_attention_cuda>));
  m.impl("chunked_attention_backward",
         TORCH_FN(chunked_attention_backward_entry<chunked_attention_backward_cuda>));
}

}  // namespace reformer

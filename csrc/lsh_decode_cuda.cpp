// lsh_decode and lsh_cache_append on CUDA: readies the tensors for the kernels, launches,
// registers.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "chunked_attention_common.h"
#include "kernel_tensors.h"
#include "kernels/lsh_decode.h"
#include "lsh_decode_common.h"
#include "next_values_common.h"
#include "reformer.h"

namespace reformer {
namespace {

using kernels::NewRows;

at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

NewRows rows_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

std::tuple<at::Tensor, at::Tensor> lsh_decode_cuda(
    const at::Tensor& q_given, const at::Tensor& keys, const at::Tensor& values,
    const at::Tensor& table, const at::Tensor& counts, const at::Tensor& buckets_given,
    const std::optional<at::Tensor>& own_values_given, std::optional<double> scale,
    bool correct_duplicates, const std::optional<at::Tensor>& before_given) {
  const c10::cuda::CUDAGuard guard(q_given.device());
  check_lsh_decode(q_given, keys, values, table, counts, buckets_given, own_values_given, scale,
                   before_given);
  const auto dtype = kernel_dtype(q_given);
  if (!dtype.has_value() || q_given.size(3) % 8 != 0 || !has_aligned_rows(keys) ||
      !has_aligned_rows(values)) {
    return lsh_decode_composite(q_given, keys, values, table, counts, buckets_given,
                                own_values_given, scale, correct_duplicates, before_given);
  }
  REFORMER_CHECK(table.size(2) <= kernels::kMaxDecodeSlots / table.size(4),
                 "lsh_decode: expected table with at most 2^28 slots of a query on CUDA, got ",
                 table.size(2), " rounds of ", table.size(4));
  const auto results = lsh_decode_output(q_given);
  const auto& [out, lse] = results;
  if (out.numel() == 0) return results;

  const at::Tensor q = with_dense_rows(q_given), buckets = buckets_given.contiguous();
  const at::Tensor own_values =
      own_values_given.has_value() ? with_dense_rows(*own_values_given) : at::Tensor();
  const at::Tensor before = before_given.has_value() ? before_given->contiguous() : at::Tensor();
  kernels::LshDecodeParams params = {};
  params.q = rows_of(q);
  if (own_values.defined()) params.own_values = rows_of(own_values);
  params.out = rows_of(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.keys = keys.const_data_ptr();
  params.values = values.const_data_ptr();
  params.table = table.const_data_ptr<int32_t>();
  params.counts = counts.const_data_ptr<int32_t>();
  params.buckets = buckets.const_data_ptr<int32_t>();
  if (before.defined()) params.before = before.const_data_ptr<int64_t>();
  params.dtype = *dtype;
  params.batch = q.size(0);
  params.heads = q.size(1);
  params.queries = q.size(2);
  params.head_dim = q.size(3);
  params.capacity = keys.size(2);
  params.rounds = table.size(2);
  params.n_buckets = table.size(3);
  params.window = table.size(4);
  params.scale = static_cast<float>(decode_scale(q, scale));
  params.self_only_lse = static_cast<float>(kSelfOnlyLse);
  params.correct_duplicates = correct_duplicates;
  const int64_t bytes = kernels::lsh_decode_workspace(params);
  at::Tensor workspace;
  if (bytes > 0) {
    workspace = at::empty({bytes}, q.options().dtype(at::kByte));
    params.workspace = workspace.mutable_data_ptr();
  }
  C10_CUDA_CHECK(kernels::lsh_decode(params, c10::cuda::getCurrentCUDAStream().stream()));
  return results;
}

void lsh_cache_append_cuda(const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& table, const at::Tensor& counts,
                           const at::Tensor& k_given, const at::Tensor& v_given,
                           const at::Tensor& buckets_given, const at::Tensor& lengths_given,
                           bool normalize, const std::optional<at::Tensor>& value_mix,
                           const std::optional<at::Tensor>& last_values) {
  const c10::cuda::CUDAGuard guard(k_given.device());
  check_lsh_cache_append(keys, values, table, counts, k_given, v_given, buckets_given,
                         lengths_given, value_mix, last_values);
  const auto dtype = kernel_dtype(k_given);
  if (!dtype.has_value() || k_given.size(3) % 8 != 0 || !has_aligned_rows(keys) ||
      !has_aligned_rows(values) || (last_values.has_value() && !has_aligned_rows(*last_values))) {
    lsh_cache_append_composite(keys, values, table, counts, k_given, v_given, buckets_given,
                               lengths_given, normalize, value_mix, last_values);
    return;
  }
  if (k_given.numel() == 0) return;

  const at::Tensor k = with_aligned_rows(k_given), v = with_aligned_rows(v_given);
  const at::Tensor buckets = buckets_given.contiguous(), lengths = lengths_given.contiguous();
  kernels::LshCacheAppendParams params = {};
  params.keys = keys.mutable_data_ptr();
  params.values = values.mutable_data_ptr();
  params.table = table.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.k = rows_of(k);
  params.v = rows_of(v);
  params.normalize = normalize;
  at::Tensor factors;
  if (value_mix.has_value()) {
    factors = wide_value_mix(v, *value_mix);
    params.value_mix = factors.const_data_ptr<float>();
    params.last_values = last_values->mutable_data_ptr();
  }
  params.buckets = buckets.const_data_ptr<int32_t>();
  params.lengths = lengths.const_data_ptr<int64_t>();
  params.dtype = *dtype;
  params.batch = k.size(0);
  params.heads = k.size(1);
  params.rows = k.size(2);
  params.head_dim = k.size(3);
  params.capacity = keys.size(2);
  params.rounds = table.size(2);
  params.n_buckets = table.size(3);
  params.window = table.size(4);
  at::Tensor order, scratch;
  if (params.rows > kernels::kRowsCounted) {
    const int64_t n_buckets = table.size(3);
    const at::Tensor wanted = at::where(buckets < 0, n_buckets, buckets).clamp_max(n_buckets);
    order = bucket_sort(wanted.to(at::kInt), n_buckets + 1);
    scratch = at::empty_like(counts);
    params.order = order.const_data_ptr<int32_t>();
    params.scratch = scratch.mutable_data_ptr<int32_t>();
  }
  C10_CUDA_CHECK(kernels::lsh_cache_append(params, c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CUDA, m) {
  m.impl("lsh_decode", &lsh_decode_cuda);
  m.impl("lsh_cache_append", &lsh_cache_append_cuda);
}

}  // namespace reformer

// plan: asks the plans of the kernels, which are plain C++.
#include "plan.h"

#include "checks.h"
#include "kernels/bucket_sort/plan.h"
#include "kernels/chunked_attention/plan.h"
#include "kernels/lsh_hash/plan.h"
#include "lsh_hash_common.h"

namespace reformer {
namespace {

constexpr const char* kOp = "plan";

struct Architecture {
  int64_t arch;
  int multiprocessors, shared_memory;  // of its largest common GPU; KiB a block may ask for
};
constexpr Architecture kArchitectures[] = {
    {80, 108, 163},   // A100
    {86, 84, 99},     // RTX A6000, A40
    {89, 142, 99},    // L40S
    {90, 132, 227},   // H100, H200
    {100, 148, 227},  // B200
    {120, 188, 99},   // RTX PRO 6000
};

kernels::DeviceTraits traits_of(int64_t arch, int64_t multiprocessors) {
  for (const Architecture& known : kArchitectures) {
    if (known.arch != arch) continue;
    return {static_cast<int>(arch / 10), static_cast<int>(arch % 10),
            multiprocessors > 0 ? static_cast<int>(multiprocessors) : known.multiprocessors,
            known.shared_memory * 1024};
  }
  REFORMER_CHECK(false, kOp, ": expected arch 80, 86, 89, 90, 100 or 120, got ", arch);
}

kernels::DType kernel_dtype(at::ScalarType dtype) {
  REFORMER_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, kOp,
                 ": expected dtype float32, float16 or bfloat16, got ", dtype);
  return dtype == at::kFloat  ? kernels::DType::f32
         : dtype == at::kHalf ? kernels::DType::f16
                              : kernels::DType::bf16;
}

// Plans ask of pointers only whether they are null, and how they are aligned.
template <typename T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{256});
}

KernelChoice plan_hash(const PlanRequest& request, const kernels::DeviceTraits& traits,
                       bool has_wgmma) {
  kernels::LshHashParams params = {};
  params.x = somewhere<const void>();
  params.rotations = somewhere<const void>();
  params.x_dtype = params.rotations_dtype = kernel_dtype(request.dtype);
  params.batch = request.batch;
  params.heads = params.rotation_heads = request.heads;
  params.length = request.length;
  params.head_dim = request.head_dim;
  params.rounds = request.rounds;
  params.x_stride_l = request.head_dim;
  params.x_stride_h = params.x_stride_l * request.length;
  params.x_stride_b = params.x_stride_h * request.heads;
  params.n_factors = static_cast<int>(request.n_buckets.size());
  for (int f = 0; f < params.n_factors; ++f) {
    params.factors[f] = static_cast<int32_t>(request.n_buckets[f]);
  }
  const auto plan = kernels::plan_lsh_hash(params, traits, has_wgmma);
  return {kernels::name_of(plan.kernel), plan.workspace, request.batch * request.heads};
}

KernelChoice plan_sort(const PlanRequest& request, const kernels::DeviceTraits& traits,
                       bool has_clusters, int64_t n_buckets) {
  kernels::BucketSortParams params = {};
  params.segments = request.batch * request.heads * request.rounds;
  params.length = request.length;
  params.n_buckets = n_buckets;
  const auto plan = kernels::sort::make_plan(params, traits, has_clusters);
  return {kernels::sort::name_of(plan.method), plan.workspace(), plan.group};
}

template <typename Params>
KernelChoice plan_attention(const PlanRequest& request, const kernels::DeviceTraits& traits,
                            bool has_wgmma) {
  const AttentionOptions& options = request.options;
  const bool sorted = request.rounds > 0;
  const kernels::HeadsView rows{somewhere<void>(),
                                request.heads * request.length * request.head_dim,
                                request.length * request.head_dim, request.head_dim};
  Params params = {};
  params.q = params.v = params.own_values = rows;
  if (!request.shared_qk) params.k = rows;
  if (sorted) params.order = somewhere<const int32_t>();
  if (sorted && request.same_bucket) params.buckets = somewhere<const int32_t>();
  params.dtype = kernel_dtype(request.dtype);
  params.batch = request.batch;
  params.heads = request.heads;
  params.length = request.length;
  params.head_dim = request.head_dim;
  params.rounds = sorted ? request.rounds : 1;
  params.chunk_size = options.chunk_size;
  params.look_back = options.look_back;
  params.look_ahead = options.look_ahead;
  params.causal = options.causal;
  params.mask_self = options.mask_self.value_or(request.shared_qk);
  params.wrap = options.wrap.value_or(sorted);
  params.correct_duplicates = options.correct_duplicates;
  params.scale = static_cast<float>(options.scale.value_or(1.0));  // its sign is what counts
  params.dropout_p = options.dropout_p;
  params.workspace_cap = workspace_limit();
  REFORMER_CHECK(kernels::attention_is_valid(params), kOp,
                 ": expected sizes and options that chunked_attention takes on CUDA, got length ",
                 request.length, " in ", params.rounds, " rounds, head_dim ", request.head_dim,
                 ", chunk_size ", options.chunk_size);
  const auto plan = kernels::plan_chunked_attention(params, traits, has_wgmma);
  return {kernels::name_of(plan.kernel), plan.workspace, plan.head_group};
}

}  // namespace

KernelPlan plan(const PlanRequest& request) {
  REFORMER_CHECK(request.batch >= 1 && request.heads >= 1 && request.length >= 1, kOp,
                 ": expected batch, heads and length >= 1, got ", request.batch, ", ",
                 request.heads, " and ", request.length);
  REFORMER_CHECK(request.rounds >= 0, kOp, ": expected n_hashes >= 0, got ", request.rounds);
  const kernels::DeviceTraits traits = traits_of(request.arch, request.multiprocessors);
  const bool sm_90a = request.arch == 90;  // others run the code for 8.0
  KernelPlan result;
  result.arch = request.arch;
  result.multiprocessors = traits.multiprocessors;
  if (request.rounds > 0) {
    const int64_t product = check_n_buckets(kOp, request.n_buckets);
    result.hash = plan_hash(request, traits, sm_90a);
    result.sort = plan_sort(request, traits, sm_90a,
                            product + (request.options.key_padding_mask.has_value() ? 1 : 0));
  }
  result.forward = plan_attention<kernels::ChunkedAttentionParams>(request, traits, sm_90a);
  result.backward =
      plan_attention<kernels::ChunkedAttentionBackwardParams>(request, traits, sm_90a);
  return result;
}

}  // namespace reformer

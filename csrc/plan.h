// Which CUDA kernels the operators would run, without running them, nor any GPU.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>

#include "reformer.h"

namespace reformer {

// One attention: rounds == 0: local, in natural order, nothing hashed or sorted.
struct PlanRequest {
  int64_t batch, heads, length, head_dim;
  at::ScalarType dtype;
  int64_t rounds;
  std::vector<int64_t> n_buckets;  // factors
  bool shared_qk, same_bucket;
  AttentionOptions options;
  int64_t arch;             // 90: compute capability 9.0
  int64_t multiprocessors;  // 0: as many as that architecture's largest common GPU has
};

// A kernel's name, its scratch memory in bytes, and how many heads (sort: sequences) share that.
struct KernelChoice {
  std::string kernel;
  int64_t workspace = 0, group = 0;
};

struct KernelPlan {
  int64_t arch, multiprocessors;
  KernelChoice hash, sort, forward, backward;  // hash and sort have no name for local attention
};

// Of a build with code for 9.0a and PTX for 8.0, which newer architectures run.
KernelPlan plan(const PlanRequest& request);

}  // namespace reformer

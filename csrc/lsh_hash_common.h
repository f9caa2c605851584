// lsh_hash: what its CPU, CUDA and Meta kernels share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace reformer {

inline constexpr size_t kMaxHashFactors = 8;

// Raises unless the arguments are as reformer.h says. Runs under tracing too.
void check_lsh_hash(const at::Tensor& x, const at::Tensor& rotations, at::IntArrayRef n_buckets,
                    const std::optional<at::Tensor>& key_padding_mask);

// Even factors whose product (the padding bucket) fits the buckets' int32; returns that product.
int64_t check_n_buckets(const char* op, at::IntArrayRef n_buckets);

// The uninitialised result: int32 [B, H, R, L], contiguous.
at::Tensor lsh_hash_output(const at::Tensor& x, const at::Tensor& rotations);

}  // namespace reformer

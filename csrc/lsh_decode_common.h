// lsh_decode and lsh_cache_append: what their CPU, CUDA and composite kernels share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

namespace reformer {

// Raise unless the arguments are as reformer.h says (but for the values of table, counts, buckets
// and lengths). Run under tracing too.
void check_lsh_decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                      const at::Tensor& table, const at::Tensor& counts, const at::Tensor& buckets,
                      const std::optional<at::Tensor>& own_values, std::optional<double> scale,
                      const std::optional<at::Tensor>& before);
void check_lsh_cache_append(const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& table, const at::Tensor& counts, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& buckets,
                            const at::Tensor& lengths, const std::optional<at::Tensor>& value_mix,
                            const std::optional<at::Tensor>& last_values);

// The uninitialised out, like q, and lse [B, H, T] in float32 (float64 for float64).
std::tuple<at::Tensor, at::Tensor> lsh_decode_output(const at::Tensor& q);

// x [B, H, T, D] with rows of length one, as F.normalize in float32 or more makes them.
at::Tensor unit_rows(const at::Tensor& x);

// What the cache keeps of the new values v under value_mix (see reformer.h), by ATen operators: it
// completes the value before them and renews last_values.
at::Tensor append_next_values(const at::Tensor& values, const at::Tensor& v,
                              const at::Tensor& buckets, const at::Tensor& lengths,
                              int64_t n_buckets, const at::Tensor& value_mix,
                              const at::Tensor& last_values);

// The operators by ATen operators, for any device, dtype, D and alignment.
std::tuple<at::Tensor, at::Tensor> lsh_decode_composite(
    const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
    const at::Tensor& counts, const at::Tensor& buckets,
    const std::optional<at::Tensor>& own_values, std::optional<double> scale,
    bool correct_duplicates, const std::optional<at::Tensor>& before);
void lsh_cache_append_composite(const at::Tensor& keys, const at::Tensor& values,
                                const at::Tensor& table, const at::Tensor& counts,
                                const at::Tensor& k, const at::Tensor& v, const at::Tensor& buckets,
                                const at::Tensor& lengths, bool normalize,
                                const std::optional<at::Tensor>& value_mix,
                                const std::optional<at::Tensor>& last_values);

inline double decode_scale(const at::Tensor& q, std::optional<double> scale) {
  return scale.value_or(std::pow(static_cast<double>(q.size(3)), -0.5));
}

}  // namespace reformer

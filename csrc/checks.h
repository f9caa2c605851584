// Checks shared by the operators. They read symbolic sizes, so that the same checks run under
// tracing. Messages name operator, argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// TORCH_CHECK with a message put together without C++ streams: where the compiler links a static
// libstdc++ into the extension, formatting a number through a stream mixes two of them and crashes.
#define REFORMER_CHECK(condition, ...) TORCH_CHECK(condition, ::reformer::message(__VA_ARGS__))

namespace reformer {

inline std::string text(const char* x) { return x; }
inline std::string text(int32_t x) { return std::to_string(x); }
inline std::string text(int64_t x) { return std::to_string(x); }
inline std::string text(size_t x) { return std::to_string(x); }
inline std::string text(double x) { return std::to_string(x); }
inline std::string text(at::ScalarType x) { return c10::toString(x); }
inline std::string text(const at::Device& x) { return x.str(); }
inline std::string text(const c10::SymInt& x) {
  return x.is_symbolic() ? x.toSymNode()->str() : std::to_string(x.expect_int());
}

template <typename Integer>
std::string text(c10::ArrayRef<Integer> list) {
  std::string result = "[";
  for (const Integer& x : list) result += (result.size() > 1 ? ", " : "") + text(x);
  return result + "]";
}

template <typename... Parts>
std::string message(const Parts&... parts) {
  return (text(parts) + ...);
}

inline bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
         dtype == at::kDouble;
}

inline void check_rank(const char* op, const char* name, const at::Tensor& x, int64_t rank,
                       const char* layout) {
  REFORMER_CHECK(x.dim() == rank, op, ": expected ", name, " of shape ", layout, ", got ",
                 x.sym_sizes());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& x,
                        c10::SymIntArrayRef expected, const char* reason) {
  REFORMER_CHECK(x.sym_sizes() == expected, op, ": expected ", name, " of shape ", expected, " ",
                 reason, ", got ", x.sym_sizes());
}

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
  REFORMER_CHECK(is_supported_float(x.scalar_type()), op, ": expected ", name,
                 " of dtype float32, float16, bfloat16 or float64, got ", x.scalar_type());
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& x,
                        at::ScalarType expected) {
  REFORMER_CHECK(x.scalar_type() == expected, op, ": expected ", name, " of dtype ", expected,
                 ", got ", x.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& x,
                         const at::Tensor& like) {
  REFORMER_CHECK(x.device() == like.device(), op, ": expected ", name, " on ", like.device(),
                 ", got ", x.device());
}

// x of the shape, dtype and device of another, which `reason` names: "like q".
inline void check_like(const char* op, const char* name, const at::Tensor& x,
                       const at::Tensor& like, const char* reason) {
  check_shape(op, name, x, like.sym_sizes(), reason);
  check_dtype(op, name, x, like.scalar_type());
  check_device(op, name, x, like);
}

// x [B, H, L, D] of a floating dtype, with L and H at least 1 and 1 <= D <= 256.
inline void check_heads(const char* op, const char* name, const at::Tensor& x) {
  check_rank(op, name, x, 4, "[B, H, L, D]");
  check_float(op, name, x);
  REFORMER_CHECK(x.sym_size(1) >= 1 && x.sym_size(2) >= 1, op, ": expected ", name,
                 " with at least one head and one position, got ", x.sym_sizes());
  REFORMER_CHECK(x.sym_size(3) >= 1 && x.sym_size(3) <= 256, op, ": expected ", name,
                 " with a head dimension in 1 ... 256, got ", x.sym_sizes());
}

// bool [B, L], true = padding.
inline void check_key_padding_mask(const char* op, const at::Tensor& mask, const at::Tensor& x) {
  check_shape(op, "key_padding_mask", mask, {x.sym_size(0), x.sym_size(2)}, "(batch, length)");
  check_dtype(op, "key_padding_mask", mask, at::kBool);
  check_device(op, "key_padding_mask", mask, x);
}

}  // namespace reformer

// Rows as stored and rows in the computing type on the CPU: read, gathered, turned, added up.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/line.h"
#include "lanes.h"

namespace reformer {
namespace {  // chunked_attention_cpu.cpp alone includes this

constexpr double kNormEps = 1e-12;  // torch.nn.functional.normalize's
constexpr int64_t kMaxHeadDim = 256;

template <typename T>
int64_t pad_to_lanes(int64_t n) {
  return divide_up(n, Lanes<T>::kSize) * Lanes<T>::kSize;
}

// Uninitialised, aligned to 64 bytes.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(c10::GetCPUAllocator()->allocate(size * sizeof(T))) {}
  T* get() const { return static_cast<T*>(data_.get()); }

 private:
  c10::DataPtr data_;
};

// [B, H, L, D] as stored, last dimension contiguous.
struct Rows {
  at::Tensor tensor;
  int64_t heads = 1;

  Rows() = default;
  explicit Rows(const at::Tensor& x)
      : tensor(x.stride(3) == 1 ? x : x.contiguous()), heads(x.size(1)) {}
  template <typename S>
  S* head(int64_t index) const {
    return static_cast<S*>(tensor.data_ptr()) + index / heads * tensor.stride(0) +
           index % heads * tensor.stride(1);
  }
  int64_t stride() const { return tensor.stride(2); }
};

// The compiler's own type where it has one, since it has vector instructions for that.
#ifdef __FLT16_MANT_DIG__
using Half = _Float16;
#else
using Half = c10::Half;
#endif

// f(head's first row as stored): rows are converted where they are read, never as a whole. What
// float computes may be stored in half precision.
template <typename T, typename F>
void visit_head(const Rows& rows, int64_t index, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    const at::ScalarType stored = rows.tensor.scalar_type();
    if (stored == at::kBFloat16) return f(rows.head<const c10::BFloat16>(index));
    if (stored == at::kHalf) return f(rows.head<const Half>(index));
  }
  f(rows.head<const T>(index));
}

template <typename T, typename S>
REFORMER_INLINE void convert_row(const S* row, int64_t n, T* result) {
  for (int64_t d = 0; d < n; ++d) result[d] = static_cast<T>(row[d]);
}

// The row in the computing type: itself, or in scratch.
template <typename T>
REFORMER_INLINE const T* computing_row(const T* row, int64_t, T*) {
  return row;
}

template <typename T, typename S>
REFORMER_INLINE const T* computing_row(const S* row, int64_t n, T* scratch) {
  convert_row(row, n, scratch);
  return scratch;
}

template <typename T>
REFORMER_INLINE T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t lanes = Lanes<T>::kSize;
  Vector<T> sums{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sums += load(a + i) * load(b + i);
  T total = sum<T>(sums);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// 1 / |q| of each row, |q| at least kNormEps; the largest |q|^2.
template <typename T, typename S>
REFORMER_CLONES T inverse_norms(const S* rows, int64_t stride, int64_t n, int64_t head_dim,
                                T* result) {
  T scratch[kMaxHeadDim], largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T* row = computing_row(rows + i * stride, head_dim, scratch);
    const T square = dot(row, row, head_dim);
    largest = std::max(largest, square);
    result[i] = T(1) / std::max(std::sqrt(square), static_cast<T>(kNormEps));
  }
  return largest;
}

// The same of shrunk rows, where squares may overflow. Returns the power of two they are shrunk by.
template <typename T, typename S>
T shrunk_inverse_norms(const S* rows, int64_t stride, int64_t n, int64_t head_dim, T* result) {
  T peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) {
      const T x = std::abs(static_cast<T>(rows[i * stride + d]));
      if (x <= std::numeric_limits<T>::max()) peak = std::max(peak, x);
    }
  }
  constexpr int exponent = std::numeric_limits<T>::max_exponent / 2 - 8;  // that products allow
  const T shrink = std::ldexp(T(1), std::min(0, exponent - std::ilogb(std::max(peak, T(1)))));
  if (shrink == T(1)) return shrink;  // an infinite element, not a long row
  for (int64_t i = 0; i < n; ++i) {
    T square = 0;
    for (int64_t d = 0; d < head_dim; ++d) {
      const T x = static_cast<T>(rows[i * stride + d]) * shrink;
      square += x * x;
    }
    result[i] = T(1) / std::max(std::sqrt(square), static_cast<T>(kNormEps) * shrink);
  }
  return shrink;
}

template <typename T, typename S>
bool is_finite(const S* row, int64_t head_dim) {
  T sum = 0;  // 0 times anything finite
  for (int64_t d = 0; d < head_dim; ++d) sum += T(0) * static_cast<T>(row[d]);
  return sum == 0;
}

// Rows of x at these positions; zeros where there is none, and after head_dim.
template <typename T, typename S>
REFORMER_CLONES void gather(const S* x, int64_t stride, int64_t head_dim,
                            const Integer<T>* positions, int64_t n, T* rows, int64_t width) {
  for (int64_t i = 0; i < n; ++i) {
    T* row = rows + i * width;
    const int64_t copied = positions[i] < 0 ? 0 : head_dim;
    if (copied > 0) convert_row(x + positions[i] * stride, copied, row);
    for (int64_t d = copied; d < width; ++d) row[d] = T(0);
  }
}

template <typename T>
void gather(const Rows& x, int64_t head, int64_t head_dim, const Integer<T>* positions, int64_t n,
            T* rows, int64_t width) {
  visit_head<T>(x, head, [&](const auto* stored) {
    gather(stored, x.stride(), head_dim, positions, n, rows, width);
  });
}

// Adds rows to those of x at these positions.
template <typename T>
REFORMER_CLONES void scatter_add(const T* rows, int64_t width, const Integer<T>* positions,
                                 int64_t n, T* x, int64_t stride, int64_t head_dim) {
  for (int64_t i = 0; i < n; ++i) {
    if (positions[i] < 0) continue;
    T* target = x + positions[i] * stride;
    for (int64_t d = 0; d < head_dim; ++d) target[d] += rows[i * width + d];
  }
}

// [n, width] -> [head_dim, row]; n is padded to whole vectors.
template <typename T>
REFORMER_CLONES void transpose(const T* rows, int64_t width, int64_t n, int64_t head_dim,
                               T* columns, int64_t row) {
  constexpr int64_t lanes = Lanes<T>::kSize;
  for (int64_t i = 0; i < n; i += lanes) {
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        columns[d * row + i + lane] = rows[(i + lane) * width + d];
      }
    }
  }
}

}  // namespace
}  // namespace reformer

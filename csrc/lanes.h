// Vectors of 64 bytes in GCC's and Clang's vector extensions, and what the CPU kernels do with
// them. One source serves every instruction set: REFORMER_CLONES compiles a function for AVX-512,
// AVX2 and the baseline, and the loader picks. What it calls must be REFORMER_INLINE, to be
// compiled with it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define REFORMER_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REFORMER_CLONES
#endif
#define REFORMER_INLINE inline __attribute__((always_inline))

// Vectors are passed between inlined functions only: no calling convention is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace reformer {

// Floating lanes, and integer lanes of the same width (positions, masks).
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Integer = int32_t;
  using Word = uint32_t;
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t IntegerVector __attribute__((vector_size(64)));
  typedef uint32_t WordVector __attribute__((vector_size(64)));
  static constexpr int kSize = 16;
};

template <>
struct Lanes<double> {
  using Integer = int64_t;
  using Word = uint64_t;
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t IntegerVector __attribute__((vector_size(64)));
  typedef uint64_t WordVector __attribute__((vector_size(64)));
  static constexpr int kSize = 8;
};

template <typename T>
using Vector = typename Lanes<T>::Vector;
template <typename T>
using Integer = typename Lanes<T>::Integer;
template <typename T>
using IntegerVector = typename Lanes<T>::IntegerVector;
template <typename T>
using WordVector = typename Lanes<T>::WordVector;

template <typename T>
REFORMER_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
REFORMER_INLINE IntegerVector<T> load_integers(const Integer<T>* from) {
  IntegerVector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
REFORMER_INLINE void store(T* to, const Vector<T>& x) {
  std::memcpy(to, &x, sizeof(x));
}

template <typename T>
REFORMER_INLINE T sum(const Vector<T>& x) {
  T total = 0;
  for (int i = 0; i < Lanes<T>::kSize; ++i) total += x[i];
  return total;
}

template <typename T>
REFORMER_INLINE T max(const Vector<T>& x) {
  T best = x[0];
  for (int i = 1; i < Lanes<T>::kSize; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// e^x within 2 ulp for x <= 80; exactly 0 below the smallest normal result; NaN stays NaN.
template <typename T>
REFORMER_INLINE Vector<T> exp(const Vector<T>& x);

template <>
REFORMER_INLINE Vector<float> exp<float>(const Vector<float>& x) {
  using V = Vector<float>;
  using I = IntegerVector<float>;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V clamped = x > 80.0f ? V{} + 80.0f : x;
  const V shifted = clamped * 1.44269504089f + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln(2) / 2
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const I bits = ((I)shifted - 0x4B400000 + 127) << 23;  // 2^n
  const V result = y * (V)bits;
  return x < -87.0f ? V{} : result;
}

template <>
REFORMER_INLINE Vector<double> exp<double>(const Vector<double>& x) {
  using V = Vector<double>;
  using I = IntegerVector<double>;
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const V clamped = x > 700.0 ? V{} + 700.0 : x;
  const V shifted = clamped * 1.4426950408889634 + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  constexpr double inverse_factorials[] = {1.0 / 6227020800,
                                           1.0 / 479001600,
                                           1.0 / 39916800,
                                           1.0 / 3628800,
                                           1.0 / 362880,
                                           1.0 / 40320,
                                           1.0 / 5040,
                                           1.0 / 720,
                                           1.0 / 120,
                                           1.0 / 24,
                                           1.0 / 6,
                                           1.0 / 2,
                                           1.0,
                                           1.0};
  V y = V{} + inverse_factorials[0];
  for (int i = 1; i < 14; ++i) y = y * r + inverse_factorials[i];
  const I bits = ((I)shifted - 0x4338000000000000 + 1023) << 52;
  const V result = y * (V)bits;
  return x < -708.0 ? V{} : result;
}

// C [m, n] (+)= A [m, k] B [k, n] with n a multiple of the lanes; A has any two strides, the rows
// of B and C are contiguous. Six rows of C stay in registers: 12 of AVX2's 16.
template <typename T, int kRows>
REFORMER_INLINE void multiply_rows(const T* a, int64_t a_row, int64_t a_column, const T* b,
                                   int64_t b_row, T* c, int64_t c_row, int64_t k, bool add) {
  Vector<T> sums[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sums[r] = add ? load(c + r * c_row) : Vector<T>{};
  for (int64_t i = 0; i < k; ++i) {
    const Vector<T> row = load(b + i * b_row);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) sums[r] += a[r * a_row + i * a_column] * row;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) store(c + r * c_row, sums[r]);
}

template <typename T>
REFORMER_INLINE void multiply(const T* a, int64_t a_row, int64_t a_column, const T* b,
                              int64_t b_row, T* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
                              bool add) {
  for (int64_t column = 0; column < n; column += Lanes<T>::kSize) {
    int64_t row = 0;
    const auto step = [&](auto rows) __attribute__((always_inline)) {
      multiply_rows<T, decltype(rows)::value>(a + row * a_row, a_row, a_column, b + column, b_row,
                                              c + row * c_row + column, c_row, k, add);
      row += rows;
    };
    while (m - row >= 6) step(std::integral_constant<int, 6>());
    switch (m - row) {
      case 5:
        step(std::integral_constant<int, 5>());
        break;
      case 4:
        step(std::integral_constant<int, 4>());
        break;
      case 3:
        step(std::integral_constant<int, 3>());
        break;
      case 2:
        step(std::integral_constant<int, 2>());
        break;
      case 1:
        step(std::integral_constant<int, 1>());
        break;
      default:
        break;
    }
  }
}

}  // namespace reformer

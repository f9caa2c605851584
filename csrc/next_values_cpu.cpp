// next_values on the CPU. Blocks of positions, all heads of one after the other: a block's rows
// stay in the cache while their neighbours and their gradients read them again.
//
// Results have the same bits for any number of threads: every block sums its own part of the
// gradient of value_mix, and the parts are added in their order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "chunked_attention_common.h"
#include "lanes.h"
#include "next_values_common.h"

namespace reformer {
namespace {

constexpr int64_t kBlock = 64;                       // positions
constexpr int64_t kWorthAThread = int64_t{1} << 15;  // elements

// The compiler's own type where it has one, since it has vector instructions for that.
#ifdef __FLT16_MANT_DIG__
using Half = _Float16;
#else
using Half = c10::Half;
#endif

// f(S{}) for the type that x is stored in.
template <typename F>
void dispatch_stored(const at::Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(Half{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    default:
      return f(float{});
  }
}

template <typename S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

// [B, H, L, D], last dimension contiguous.
template <typename S>
struct Heads {
  S* data;
  int64_t stride_b, stride_h, stride_l;

  explicit Heads(const at::Tensor& x)
      : data(static_cast<S*>(x.data_ptr())),
        stride_b(x.stride(0)),
        stride_h(x.stride(1)),
        stride_l(x.stride(2)) {}
  S* rows(int64_t batch, int64_t head) const { return data + batch * stride_b + head * stride_h; }
};

// Which positions are none, as a value or as a neighbour: padding, and what lies beyond the ends.
struct Padding {
  at::Tensor mask;  // bool [B, L], contiguous; undefined: none
  int64_t length;

  Padding(const std::optional<at::Tensor>& given, int64_t length)
      : mask(given.has_value() ? given->contiguous() : at::Tensor()), length(length) {}
  bool operator()(int64_t batch, int64_t position) const {
    if (position < 0 || position >= length) return true;
    return mask.defined() && mask.const_data_ptr<bool>()[batch * length + position];
  }
};

// A head's factors; previous is 0 if causal.
template <typename T>
struct Mix {
  T previous, own, next;

  Mix(const T* value_mix, int64_t heads, int64_t head, bool causal)
      : previous(causal ? T(0) : value_mix[head]),
        own(value_mix[(causal ? 0 : heads) + head]),
        next(value_mix[(causal ? heads : 2 * heads) + head]) {}
};

// to = centre x + ahead x_{+1} + behind x_{-1}; a neighbour that is null is left out.
template <typename T, typename S>
REFORMER_INLINE void sum_neighbours(const S* __restrict x, T centre, const S* __restrict next,
                                    T ahead, const S* __restrict previous, T behind, int64_t n,
                                    S* __restrict to) {
  if (next != nullptr && previous != nullptr) {
    for (int64_t d = 0; d < n; ++d) {
      to[d] = static_cast<S>(centre * static_cast<T>(x[d]) + ahead * static_cast<T>(next[d]) +
                             behind * static_cast<T>(previous[d]));
    }
  } else if (next != nullptr || previous != nullptr) {
    const S* __restrict other = next != nullptr ? next : previous;
    const T factor = next != nullptr ? ahead : behind;
    for (int64_t d = 0; d < n; ++d) {
      to[d] = static_cast<S>(centre * static_cast<T>(x[d]) + factor * static_cast<T>(other[d]));
    }
  } else {
    for (int64_t d = 0; d < n; ++d) to[d] = static_cast<S>(centre * static_cast<T>(x[d]));
  }
}

// Where a block's neighbours are: bits of each of its positions.
enum Bits : uint8_t { kReal = 1, kHasNext = 2, kHasPrevious = 4 };

// A block's rows of one head: the sum of neighbours with `mix`, or with its ends exchanged. Zero at
// padding.
template <typename T, typename S>
REFORMER_CLONES void sum_block(const S* x, int64_t stride, const uint8_t* bits, int64_t count,
                               int64_t head_dim, Mix<T> mix, bool causal, bool transposed, S* to,
                               int64_t to_stride) {
  const T ahead = transposed ? mix.previous : mix.next;
  const T behind = transposed ? mix.next : mix.previous;
  const bool reads_next = !causal || !transposed, reads_previous = !causal || transposed;
  for (int64_t i = 0; i < count; ++i, x += stride, to += to_stride) {
    if (!(bits[i] & kReal)) {
      std::fill_n(to, head_dim, static_cast<S>(T(0)));
      continue;
    }
    const bool has_next = bits[i] & kHasNext, has_previous = bits[i] & kHasPrevious;
    T centre = mix.own;
    if (!has_next) centre += mix.next;
    if (!has_previous) centre += mix.previous;
    sum_neighbours<T>(x, centre, has_next && reads_next ? x + stride : nullptr, ahead,
                      has_previous && reads_previous ? x - stride : nullptr, behind, head_dim, to);
  }
}

template <typename T, typename S>
REFORMER_INLINE double dot(const S* a, const S* b, int64_t n) {
  T sums[16] = {};  // the compiler keeps them in vectors
  int64_t d = 0;
  for (; d + 16 <= n; d += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      sums[lane] += static_cast<T>(a[d + lane]) * static_cast<T>(b[d + lane]);
    }
  }
  T sum = 0;
  for (; d < n; ++d) sum += static_cast<T>(a[d]) * static_cast<T>(b[d]);
  for (const T part : sums) sum += part;
  return static_cast<double>(sum);
}

// A block's part of the gradients of a head's factors: previous, own, next.
template <typename T, typename S>
REFORMER_CLONES void sum_products(const S* v, int64_t stride, const S* grad, int64_t grad_stride,
                                  const uint8_t* bits, int64_t count, int64_t head_dim, bool causal,
                                  double* sums) {
  for (int64_t i = 0; i < count; ++i, v += stride, grad += grad_stride) {
    if (!(bits[i] & kReal)) continue;
    const double own = dot<T>(grad, v, head_dim);
    sums[1] += own;
    sums[2] += bits[i] & kHasNext ? dot<T>(grad, v + stride, head_dim) : own;
    if (!causal) sums[0] += bits[i] & kHasPrevious ? dot<T>(grad, v - stride, head_dim) : own;
  }
}

// The gradients of queries that met only themselves go to their own values.
template <typename T, typename S>
void add_own(const T* lse, int64_t count, const S* own, int64_t stride, int64_t head_dim, S* to,
             int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (lse[i] != static_cast<T>(kSelfOnlyLse)) continue;
    for (int64_t d = 0; d < head_dim; ++d) {
      S& sum = to[i * to_stride + d];
      sum = static_cast<S>(static_cast<T>(sum) + static_cast<T>(own[i * stride + d]));
    }
  }
}

// task(block's index, batch, first position, bits of its positions, how many).
template <typename Task>
void for_each_block(const at::Tensor& v, const Padding& padding, const Task& task) {
  const int64_t batch = v.size(0), length = v.size(2), blocks = (length + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (kBlock * v.size(1) * v.size(3)));
  at::parallel_for(0, batch * blocks, grain, [&](int64_t begin, int64_t end) {
    uint8_t bits[kBlock];
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / blocks, first = index % blocks * kBlock;
      const int64_t count = std::min(kBlock, length - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = first + i;
        bits[i] = padding(b, position) ? 0
                                       : kReal | (padding(b, position + 1) ? 0 : kHasNext) |
                                             (padding(b, position - 1) ? 0 : kHasPrevious);
      }
      task(index, b, first, bits, count);
    }
  });
}

at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

at::Tensor next_values_cpu(const at::Tensor& v_given, const at::Tensor& value_mix,
                           const std::optional<at::Tensor>& key_padding_mask, bool causal) {
  check_next_values(v_given, value_mix, key_padding_mask, causal);
  const at::Tensor v = with_dense_rows(v_given), out = chunked_attention_output(v_given);
  if (out.numel() == 0) return out;
  const at::Tensor wide = wide_value_mix(v, value_mix);
  const int64_t heads = v.size(1), head_dim = v.size(3);
  dispatch_stored(v, [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    const Heads<const S> from(v);
    const Heads<S> to(out);
    for_each_block(v, Padding(key_padding_mask, v.size(2)),
                   [&](int64_t, int64_t b, int64_t first, const uint8_t* bits, int64_t count) {
                     for (int64_t h = 0; h < heads; ++h) {
                       sum_block<T, S>(from.rows(b, h) + first * from.stride_l, from.stride_l, bits,
                                       count, head_dim,
                                       Mix<T>(wide.const_data_ptr<T>(), heads, h, causal), causal,
                                       false, to.rows(b, h) + first * to.stride_l, to.stride_l);
                     }
                   });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> next_values_backward_cpu(
    const at::Tensor& grad_given, const at::Tensor& v_given, const at::Tensor& value_mix,
    const std::optional<at::Tensor>& key_padding_mask, bool causal,
    const std::optional<at::Tensor>& own_grad, const std::optional<at::Tensor>& lse_given) {
  check_next_values_backward(grad_given, v_given, value_mix, key_padding_mask, causal, own_grad,
                             lse_given);
  const at::Tensor v = with_dense_rows(v_given), grad = with_dense_rows(grad_given);
  const at::Tensor own = own_grad.has_value() ? with_dense_rows(*own_grad) : v;  // or unused
  const at::Tensor lse = lse_given.has_value() ? lse_given->contiguous() : at::Tensor();
  const at::Tensor grad_v = chunked_attention_output(v_given);
  const at::Tensor wide = wide_value_mix(v, value_mix);
  const at::Tensor grad_mix = at::empty(wide.sizes(), wide.options());
  const int64_t heads = v.size(1), head_dim = v.size(3);
  const int64_t blocks = v.size(0) * ((v.size(2) + kBlock - 1) / kBlock);
  dispatch_stored(v, [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    const Heads<const S> values(v), grads(grad), own_grads(own);
    const Heads<S> to(grad_v);
    std::vector<double> parts(blocks * heads * 3);
    for_each_block(
        v, Padding(key_padding_mask, v.size(2)),
        [&](int64_t block, int64_t b, int64_t first, const uint8_t* bits, int64_t count) {
          for (int64_t h = 0; h < heads; ++h) {
            const S* grad_rows = grads.rows(b, h) + first * grads.stride_l;
            sum_block<T, S>(grad_rows, grads.stride_l, bits, count, head_dim,
                            Mix<T>(wide.const_data_ptr<T>(), heads, h, causal), causal, true,
                            to.rows(b, h) + first * to.stride_l, to.stride_l);
            if (lse.defined()) {
              add_own(lse.const_data_ptr<T>() + (b * heads + h) * v.size(2) + first, count,
                      own_grads.rows(b, h) + first * own_grads.stride_l, own_grads.stride_l,
                      head_dim, to.rows(b, h) + first * to.stride_l, to.stride_l);
            }
            sum_products<T, S>(values.rows(b, h) + first * values.stride_l, values.stride_l,
                               grad_rows, grads.stride_l, bits, count, head_dim, causal,
                               parts.data() + (block * heads + h) * 3);
          }
        });
    T* result = grad_mix.mutable_data_ptr<T>();
    for (int64_t h = 0; h < heads; ++h) {
      double sums[3] = {};
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t i = 0; i < 3; ++i) sums[i] += parts[(block * heads + h) * 3 + i];
      }
      const int64_t absent = causal ? 1 : 0;
      for (int64_t i = absent; i < 3; ++i) {
        result[(i - absent) * heads + h] = static_cast<T>(sums[i]);
      }
    }
  });
  return {grad_v, grad_mix.to(value_mix.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) {
  m.impl("next_values", &next_values_cpu);
  m.impl("next_values_backward", &next_values_backward_cpu);
}

}  // namespace reformer

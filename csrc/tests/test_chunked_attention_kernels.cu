// Chunked attention's launchers on raw buffers, without torch, against a plain loop over slots in
// double: hand-picked corners, then random shapes and flags. Usage: test_chunked_attention_kernels
// [cases] [seed].
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../kernels/chunked_attention.h"
#include "../kernels/common/dropout.h"

namespace {

using namespace reformer::kernels;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

struct Case {
  DType dtype = DType::f32;
  int64_t batch = 1, heads = 1, length = 64, head_dim = 64, rounds = 1;
  int64_t chunk_size = 16, look_back = 1, look_ahead = 0;
  bool shared_qk = true, ordered = true, causal = false, mask_self = true, wrap = true;
  bool padded = false, bucketed = false, correct_duplicates = false;
  bool transposed = false;  // inputs are [B, L, H, D] in memory
  double scale = 0;         // 0: head_dim ** -0.5
  float dropout_p = 0;
  bool grad_lse = true;
  int zero_row = -1;  // q of this position is 0
  int nan_q = -1, nan_k = -1, nan_v = -1, nan_grad = -1;
  std::vector<int64_t> checked_heads = {};  // empty: all

  std::string name() const {
    static const char* const dtypes[] = {"f32", "f16", "bf16"};
    char text[320];
    std::snprintf(text, sizeof text,
                  "%s B%ld H%ld L%ld D%ld R%ld m%ld back%ld ahead%ld%s%s%s%s%s%s%s%s%s p%.2f "
                  "zero%d nan(%d,%d,%d,%d)",
                  dtypes[static_cast<int>(dtype)], batch, heads, length, head_dim, rounds,
                  chunk_size, look_back, look_ahead, shared_qk ? " shared" : "",
                  ordered ? " ordered" : "", causal ? " causal" : "", mask_self ? " mask_self" : "",
                  wrap ? " wrap" : "", padded ? " padded" : "", bucketed ? " bucketed" : "",
                  correct_duplicates ? " duplicates" : "", transposed ? " transposed" : "",
                  dropout_p, zero_row, nan_q, nan_k, nan_v, nan_grad);
    return text;
  }
};

double round_to(DType dtype, double x) {
  switch (dtype) {
    case DType::f32:
      return static_cast<float>(x);
    case DType::f16:
      return __half2float(__float2half(static_cast<float>(x)));
    case DType::bf16:
      return __bfloat162float(__float2bfloat16(static_cast<float>(x)));
  }
  std::abort();
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Device memory, filled with bytes that are NaN in every dtype.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(std::max<int64_t>(bytes, 1)) {
    check_cuda(cudaMalloc(&data_, bytes_), "cudaMalloc");
    check_cuda(cudaMemset(data_, 0xff, bytes_), "cudaMemset");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void upload(const void* source) {
    check_cuda(cudaMemcpy(data_, source, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<char> download() const {
    std::vector<char> bytes(bytes_);
    check_cuda(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return bytes;
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

// [B, H, L, D] in double on the host and in dtype on the device.
struct Tensor {
  const Case& c;
  std::vector<double> values;  // [B, H, L, D] contiguous
  Buffer device;

  explicit Tensor(const Case& c)
      : c(c),
        values(c.batch * c.heads * c.length * c.head_dim),
        device(static_cast<int64_t>(values.size()) * size_of(c.dtype)) {}

  HeadsView view() const {
    if (c.transposed) {
      return {device.data(), c.length * c.heads * c.head_dim, c.head_dim, c.heads * c.head_dim};
    }
    return {device.data(), c.heads * c.length * c.head_dim, c.length * c.head_dim, c.head_dim};
  }
  double* row(int64_t head, int64_t l) {
    return values.data() + (head * c.length + l) * c.head_dim;
  }

  int64_t offset(int64_t head, int64_t l) const {
    const HeadsView v = view();
    return head / c.heads * v.stride_b + head % c.heads * v.stride_h + l * v.stride_l;
  }
  void fill_normal(std::mt19937& generator) {
    std::normal_distribution<double> normal;
    for (double& x : values) x = round_to(c.dtype, normal(generator));
  }
  void upload() {
    std::vector<char> bytes(values.size() * size_of(c.dtype));
    for_each_element([&](int64_t at, double& value) {
      const auto x = static_cast<float>(value);
      if (c.dtype == DType::f32) {
        reinterpret_cast<float*>(bytes.data())[at] = x;
      } else if (c.dtype == DType::f16) {
        reinterpret_cast<__half*>(bytes.data())[at] = __float2half(x);
      } else {
        reinterpret_cast<__nv_bfloat16*>(bytes.data())[at] = __float2bfloat16(x);
      }
    });
    device.upload(bytes.data());
  }
  void download() {
    const std::vector<char> bytes = device.download();
    for_each_element([&](int64_t at, double& value) {
      value = c.dtype == DType::f32 ? reinterpret_cast<const float*>(bytes.data())[at]
              : c.dtype == DType::f16
                  ? __half2float(reinterpret_cast<const __half*>(bytes.data())[at])
                  : __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(bytes.data())[at]);
    });
  }

 private:
  template <class F>
  void for_each_element(F f) {
    for (int64_t head = 0; head < c.batch * c.heads; ++head) {
      for (int64_t l = 0; l < c.length; ++l) {
        for (int64_t d = 0; d < c.head_dim; ++d) f(offset(head, l) + d, row(head, l)[d]);
      }
    }
  }
};

struct Inputs {
  const Case& c;
  Tensor q, k, v, grad_out;
  std::vector<float> grad_lse;
  std::vector<int32_t> order, buckets;
  std::vector<char> padding;
  int64_t seed = 0x123456789abcdefLL;
  double scale;

  Inputs(const Case& c, std::mt19937& generator)
      : c(c),
        q(c),
        k(c),
        v(c),
        grad_out(c),
        scale(c.scale != 0 ? c.scale : 1 / std::sqrt(c.head_dim)) {
    for (Tensor* tensor : {&q, &k, &v, &grad_out}) tensor->fill_normal(generator);
    const int64_t heads = c.batch * c.heads;
    const auto spoil = [&](Tensor& tensor, int l, double value) {
      if (l < 0) return;
      for (int64_t head = 0; head < heads; ++head) tensor.row(head, l)[l % c.head_dim] = value;
    };
    if (c.zero_row >= 0) {
      for (int64_t head = 0; head < heads; ++head)
        std::fill_n(q.row(head, c.zero_row), c.head_dim, 0.0);
    }
    spoil(q, c.nan_q, kNaN);
    spoil(k, c.nan_k, kNaN);
    spoil(v, c.nan_v, kInfinity);
    spoil(grad_out, c.nan_grad, kNaN);

    std::normal_distribution<float> normal;
    grad_lse.resize(heads * c.length);
    for (float& x : grad_lse) x = normal(generator);

    padding.resize(c.batch * c.length);
    if (c.padded) {
      for (char& x : padding) x = generator() % 4 == 0;
      for (int64_t b = 0; b < c.batch; ++b) padding[b * c.length] = c.length > 1 && b % 2 == 0;
    }
    const int n_buckets = static_cast<int>(std::max<int64_t>(2, 2 * c.length / c.chunk_size));
    for (int64_t list = 0; list < heads * c.rounds; ++list) {
      std::vector<int32_t> bucket(c.length), positions(c.length);
      for (int32_t& x : bucket) x = static_cast<int32_t>(generator() % n_buckets);
      std::iota(positions.begin(), positions.end(), 0);
      if (c.ordered) {
        std::stable_sort(positions.begin(), positions.end(),
                         [&](int32_t a, int32_t b) { return bucket[a] < bucket[b]; });
      }
      order.insert(order.end(), positions.begin(), positions.end());
      buckets.insert(buckets.end(), bucket.begin(), bucket.end());
    }
    for (Tensor* tensor : {&q, &k, &v, &grad_out}) tensor->upload();
  }
};

struct Expected {
  std::vector<double> out, lse, grad_q, grad_k, grad_v;  // [L, D] and [L]
  std::vector<double> size_out, size_q, size_k, size_v;  // the same sums over absolute values
};

// One head, by the definition: a loop over the slots in the windows of every query.
Expected expect(Inputs& in, int64_t head) {
  const Case& c = in.c;
  const int64_t length = c.length, dim = c.head_dim,
                n_chunks = (length + c.chunk_size - 1) / c.chunk_size;
  const int64_t all_chunks = c.rounds * n_chunks;
  Expected e;
  for (auto* rows :
       {&e.out, &e.grad_q, &e.grad_k, &e.grad_v, &e.size_out, &e.size_q, &e.size_k, &e.size_v}) {
    rows->assign(length * dim, 0.0);
  }
  e.lse.assign(length, -kInfinity);
  const int32_t* order = in.order.data() + head * c.rounds * length;
  const int32_t* buckets = in.buckets.data() + head * c.rounds * length;
  const char* padding = in.padding.data() + head / c.heads * length;

  std::vector<double> norm(length, 1.0);
  std::vector<double> keys(length * dim);
  for (int64_t j = 0; j < length; ++j) {
    const double* source = c.shared_qk ? in.q.row(head, j) : in.k.row(head, j);
    if (c.shared_qk) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += source[d] * source[d];
      norm[j] = std::sqrt(sum);
      if (norm[j] < 1e-12) norm[j] = 1e-12;
    }
    for (int64_t d = 0; d < dim; ++d) keys[j * dim + d] = source[d] / norm[j];
  }
  std::vector<int64_t> chunk_of(c.rounds * length);
  for (int64_t slot = 0; slot < c.rounds * length; ++slot) {
    const int64_t round = slot / length;
    chunk_of[round * length + order[slot]] =
        round * n_chunks + (slot - round * length) / c.chunk_size;
  }

  std::vector<double> grad_key(length * dim, 0.0), size_key(length * dim, 0.0);
  const auto dot = [&](const double* a, const double* b) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
  };
  const auto absolute_dot = [&](const double* a, const double* b) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += std::abs(a[d] * b[d]);
    return sum;
  };
  for (int64_t i = 0; i < length; ++i) {
    struct Slot {
      int64_t round, j;
      double logit;
    };
    std::vector<Slot> slots;
    std::vector<int> met(length, 0);
    for (int64_t round = 0; round < c.rounds; ++round) {
      const int64_t chunk = chunk_of[round * length + i];
      std::set<int64_t> window;
      for (int64_t other = chunk - c.look_back; other <= chunk + c.look_ahead; ++other) {
        if (c.wrap) {
          window.insert((other % all_chunks + all_chunks) % all_chunks);
        } else if (other >= round * n_chunks && other < (round + 1) * n_chunks) {
          window.insert(other);
        }
      }
      for (const int64_t other : window) {
        const int64_t key_round = other / n_chunks, begin = other % n_chunks * c.chunk_size;
        for (int64_t at = begin; at < std::min(begin + c.chunk_size, length); ++at) {
          const int64_t j = order[key_round * length + at];
          if (padding[j] || (c.causal && j > i) || (c.mask_self && j == i)) continue;
          if (c.bucketed &&
              (key_round != round || buckets[round * length + i] != buckets[round * length + j])) {
            continue;
          }
          const bool spoiled = !std::isfinite(dot(in.v.row(head, j), in.v.row(head, j)));
          slots.push_back(
              {round, j, spoiled ? kNaN : in.scale * dot(in.q.row(head, i), &keys[j * dim])});
          ++met[j];
        }
      }
    }
    double* out = &e.out[i * dim];
    const double* grad_out = in.grad_out.row(head, i);
    if (slots.empty()) {
      if (c.mask_self && !padding[i]) {
        e.lse[i] = kSelfOnlyLse;
        for (int64_t d = 0; d < dim; ++d) {
          out[d] = e.size_out[i * dim + d] = in.v.row(head, i)[d];
          e.grad_v[i * dim + d] += grad_out[d];
          e.size_v[i * dim + d] += std::abs(grad_out[d]);
        }
      }
      continue;
    }
    double peak = -kInfinity, sum = 0;
    for (Slot& slot : slots) {
      if (c.correct_duplicates) slot.logit -= std::log(met[slot.j]);
      peak = std::max(peak, slot.logit);
    }
    if (peak == -kInfinity) peak = 0;
    for (const Slot& slot : slots) sum += std::exp(slot.logit - peak);
    e.lse[i] = peak + std::log(sum);

    const uint32_t threshold = reformer::dropout_threshold(c.dropout_p);
    const auto factor_of = [&](const Slot& slot) {
      if (c.dropout_p == 0) return 1.0;
      const uint32_t key = reformer::dropout_row_key(in.seed, head, slot.round, i);
      const uint32_t word = reformer::dropout_word(key, reformer::dropout_key_part(slot.j));
      return word >= threshold ? 1 / (1.0 - c.dropout_p) : 0.0;
    };
    for (const Slot& slot : slots) {
      const double weight = std::exp(slot.logit - e.lse[i]) * factor_of(slot);
      for (int64_t d = 0; d < dim; ++d) {
        const double term = weight * in.v.row(head, slot.j)[d];
        out[d] += term;
        e.size_out[i * dim + d] += std::abs(term);
      }
    }
    const double grad_lse = c.grad_lse ? in.grad_lse[head * length + i] : 0;
    const double delta = dot(grad_out, out) - grad_lse;
    const double size_delta = absolute_dot(grad_out, out) + std::abs(grad_lse);
    for (const Slot& slot : slots) {
      const double probability = std::exp(slot.logit - e.lse[i]), factor = factor_of(slot);
      const double grad_weight = factor * dot(grad_out, in.v.row(head, slot.j));
      const double grad_logit = probability * (grad_weight - delta);
      const double size_logit =
          probability * (factor * absolute_dot(grad_out, in.v.row(head, slot.j)) + size_delta);
      for (int64_t d = 0; d < dim; ++d) {
        const double q = in.q.row(head, i)[d], k = keys[slot.j * dim + d];
        e.grad_q[i * dim + d] += in.scale * grad_logit * k;
        e.size_q[i * dim + d] += std::abs(in.scale * size_logit * k);
        grad_key[slot.j * dim + d] += in.scale * grad_logit * q;
        size_key[slot.j * dim + d] += std::abs(in.scale * size_logit * q);
        e.grad_v[slot.j * dim + d] += probability * factor * grad_out[d];
        e.size_v[slot.j * dim + d] += std::abs(probability * factor * grad_out[d]);
      }
    }
  }
  if (!c.shared_qk) {
    e.grad_k = grad_key;
    e.size_k = size_key;
    return e;
  }
  for (int64_t j = 0; j < length; ++j) {
    const double along =
        norm[j] > 1e-12 || std::isnan(norm[j]) ? dot(&grad_key[j * dim], &keys[j * dim]) : 0;
    for (int64_t d = 0; d < dim; ++d) {
      e.grad_q[j * dim + d] += (grad_key[j * dim + d] - along * keys[j * dim + d]) / norm[j];
      e.size_q[j * dim + d] += size_key[j * dim + d] / norm[j];
    }
  }
  return e;
}

double largest_error = 0;  // of all comparisons, in tolerances

// Rows that should hold a NaN must; in all others the error is relative to the sum of absolute
// terms.
bool compare(const char* what, const double* actual, const std::vector<double>& expected,
             const std::vector<double>& size, int64_t width, double tolerance) {
  double error = 0, total = 0;
  for (size_t row = 0; row < expected.size(); row += width) {
    bool expect_nan = false, is_nan = false;
    double row_error = 0, row_size = 0;
    for (size_t x = row; x < row + width; ++x) {
      expect_nan |= !std::isfinite(expected[x]);
      is_nan |= !std::isfinite(actual[x]);
      row_error += (actual[x] - expected[x]) * (actual[x] - expected[x]);
      row_size += size[x] * size[x];
    }
    if (expect_nan != is_nan) {
      std::printf("  %s: row %zu %s non-finite\n", what, row / width, is_nan ? "is" : "should be");
      return false;
    }
    if (expect_nan) continue;
    error += row_error;
    total += row_size;
  }
  if (total > 0) largest_error = std::max(largest_error, std::sqrt(error / total) / tolerance);
  if (std::sqrt(error) <= tolerance * std::sqrt(total)) return true;
  std::printf("  %s: relative error %.2e, tolerance %.0e\n", what, std::sqrt(error / total),
              tolerance);
  return false;
}

struct Outputs {
  Tensor out, grad_q, grad_k, grad_v;
  Buffer lse;
  explicit Outputs(const Case& c)
      : out(c), grad_q(c), grad_k(c), grad_v(c), lse(c.batch * c.heads * c.length * 4) {}
};

struct DeviceLists {
  Buffer order, buckets, padding, seed, grad_lse;
  explicit DeviceLists(const Inputs& in)
      : order(in.order.size() * 4),
        buckets(in.buckets.size() * 4),
        padding(in.padding.size()),
        seed(8),
        grad_lse(in.grad_lse.size() * 4) {
    order.upload(in.order.data());
    buckets.upload(in.buckets.data());
    padding.upload(in.padding.data());
    seed.upload(&in.seed);
    grad_lse.upload(in.grad_lse.data());
  }
};

void run(const Inputs& in, const DeviceLists& lists, Outputs& outputs) {
  const Case& c = in.c;
  ChunkedAttentionBackwardParams p = {};
  p.q = in.q.view();
  if (!c.shared_qk) p.k = in.k.view();
  p.v = p.own_values = in.v.view();
  p.order = c.ordered ? lists.order.as<int32_t>() : nullptr;
  p.buckets = c.bucketed ? lists.buckets.as<int32_t>() : nullptr;
  p.key_padding_mask = c.padded ? lists.padding.as<bool>() : nullptr;
  p.dropout_seed = c.dropout_p > 0 ? lists.seed.as<int64_t>() : nullptr;
  p.dtype = c.dtype;
  p.batch = c.batch;
  p.heads = c.heads;
  p.length = c.length;
  p.head_dim = c.head_dim;
  p.rounds = c.rounds;
  p.chunk_size = c.chunk_size;
  p.look_back = c.look_back;
  p.look_ahead = c.look_ahead;
  p.causal = c.causal;
  p.mask_self = c.mask_self;
  p.wrap = c.wrap;
  p.correct_duplicates = c.correct_duplicates;
  p.scale = static_cast<float>(in.scale);
  p.workspace_cap = c.rounds % 2 == 0 ? 0 : int64_t{1} << 30;  // one head after the other, or all
  p.dropout_p = c.dropout_p;
  p.out = outputs.out.view();
  p.lse = outputs.lse.as<float>();
  {
    const Buffer workspace(chunked_attention_forward_workspace(p));
    p.workspace = workspace.data();
    check_cuda(chunked_attention_forward(p, nullptr), "chunked_attention_forward");
    check_cuda(cudaDeviceSynchronize(), "forward");
  }
  p.grad_out = in.grad_out.view();
  p.grad_lse = c.grad_lse ? lists.grad_lse.as<float>() : nullptr;
  p.grad_q = outputs.grad_q.view();
  if (!c.shared_qk) p.grad_k = outputs.grad_k.view();
  p.grad_v = outputs.grad_v.view();
  const Buffer workspace(chunked_attention_backward_workspace(p));
  p.workspace = workspace.data();
  check_cuda(chunked_attention_backward(p, nullptr), "chunked_attention_backward");
  check_cuda(cudaDeviceSynchronize(), "backward");
}

bool passes(const Case& c, std::mt19937& generator) {
  Inputs in(c, generator);
  const DeviceLists lists(in);
  Outputs outputs(c), again(c);
  run(in, lists, outputs);
  run(in, lists, again);
  bool ok = true;
  for (const auto& [first, second] :
       {std::pair{&outputs.grad_q, &again.grad_q}, std::pair{&outputs.grad_k, &again.grad_k},
        std::pair{&outputs.grad_v, &again.grad_v}, std::pair{&outputs.out, &again.out}}) {
    if (first->device.download() != second->device.download()) {
      std::printf("  two runs differ\n");
      ok = false;
    }
  }
  for (Tensor* tensor : {&outputs.out, &outputs.grad_q, &outputs.grad_k, &outputs.grad_v})
    tensor->download();
  const std::vector<char> lse_bytes = outputs.lse.download();
  const auto* lse = reinterpret_cast<const float*>(lse_bytes.data());

  const double tolerance = c.dtype == DType::f32 ? 1e-5 : c.dtype == DType::f16 ? 1.5e-3 : 1e-2;
  std::vector<int64_t> heads = c.checked_heads;
  if (heads.empty()) {
    heads.resize(c.batch * c.heads);
    std::iota(heads.begin(), heads.end(), 0);
  }
  for (const int64_t head : heads) {
    const Expected e = expect(in, head);
    std::vector<double> size(c.length), head_lse(c.length), expected_lse = e.lse;
    for (int64_t i = 0; i < c.length; ++i) {
      head_lse[i] = lse[head * c.length + i];
      size[i] = std::max(1.0, std::abs(e.lse[i]));
      if (e.lse[i] == kSelfOnlyLse || e.lse[i] == -kInfinity) {  // exactly so
        bool exact = head_lse[i] == e.lse[i];
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const double value = outputs.out.row(head, i)[d], expected = e.out[i * c.head_dim + d];
          exact &= value == expected || !std::isfinite(expected);
        }
        if (!exact)
          std::printf("  head %ld query %ld without keys: lse %g\n", head, i, head_lse[i]);
        ok &= exact;
        head_lse[i] = expected_lse[i] = 0;
      }
    }
    ok &= compare("lse", head_lse.data(), expected_lse, size, 1, std::min(tolerance, 1e-4));
    ok &= compare("out", outputs.out.row(head, 0), e.out, e.size_out, c.head_dim, tolerance);
    ok &= compare("grad_q", outputs.grad_q.row(head, 0), e.grad_q, e.size_q, c.head_dim, tolerance);
    if (!c.shared_qk) {
      ok &=
          compare("grad_k", outputs.grad_k.row(head, 0), e.grad_k, e.size_k, c.head_dim, tolerance);
    }
    ok &= compare("grad_v", outputs.grad_v.row(head, 0), e.grad_v, e.size_v, c.head_dim, tolerance);
  }
  if (!ok) std::printf("FAILED %s\n", c.name().c_str());
  return ok;
}

// Local attention: its own kernels on sm_90a, for these head dimensions and chunks of whole tiles.
Case random_local_case(std::mt19937& generator) {
  const auto pick = [&](std::vector<int64_t> values) {
    return values[generator() % values.size()];
  };
  const auto chance = [&](int one_in) { return generator() % one_in == 0; };
  Case c;
  c.dtype = chance(2) ? DType::f16 : DType::bf16;
  c.batch = pick({1, 1, 2});
  c.heads = pick({1, 2, 3});
  c.head_dim = pick({32, 64, 64, 128});
  c.length = pick({1, 63, 64, 65, 129, 200, 256, 320, 450, 577});
  c.chunk_size = pick({64, 64, 128, 128, 192, 256, 512, 1000});
  c.look_back = pick({0, 1, 1, 1, 2, 1000});
  c.look_ahead = pick({0, 0, 0, 1, 2});
  c.ordered = c.shared_qk = false;
  c.wrap = chance(4);
  c.mask_self = chance(4);
  c.causal = chance(2);
  c.padded = chance(3);
  c.transposed = chance(3);
  c.grad_lse = !chance(4);
  c.scale = chance(4) ? 0.5 : 0.0;
  return c;
}

Case random_case(std::mt19937& generator) {
  const auto pick = [&](std::vector<int64_t> values) {
    return values[generator() % values.size()];
  };
  const auto chance = [&](int one_in) { return generator() % one_in == 0; };
  if (chance(4)) return random_local_case(generator);
  Case c;
  c.dtype = static_cast<DType>(generator() % 3);
  c.batch = pick({1, 1, 2});
  c.heads = pick({1, 2});
  c.head_dim = pick({8, 16, 24, 32, 40, 64, 64, 96, 128, 136, 256});
  c.length = pick({1, 2, 3, 7, 31, 64, 65, 100, 129, 200});
  c.chunk_size = pick({1, 3, 8, 16, 17, 64, 64, 100, 128, 300});
  c.look_back = pick({0, 1, 1, 1, 2, 5, 1000});
  c.look_ahead = pick({0, 0, 1, 3});
  c.ordered = !chance(4);
  c.rounds = c.ordered ? pick({1, 2, 3, 4}) : 1;
  c.wrap = chance(2);
  c.shared_qk = chance(2);
  c.mask_self = chance(2);
  c.causal = chance(2);
  c.padded = chance(3);
  c.bucketed = chance(4);
  c.correct_duplicates = chance(3);
  c.transposed = chance(3);
  c.dropout_p = chance(4) ? 0.3f : 0.0f;
  c.grad_lse = !chance(4);
  c.scale = chance(4) ? 1.0 : 0.0;
  return c;
}

std::vector<Case> corners() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case base;
    base.dtype = dtype;
    base.heads = 2;
    base.length = 200;
    base.rounds = 3;
    base.chunk_size = 64;
    base.causal = true;
    for (const int64_t head_dim : {32, 64, 128, 256}) {
      Case c = base;
      c.head_dim = head_dim;
      cases.push_back(c);
      c.shared_qk = c.mask_self = c.causal = false;
      cases.push_back(c);
      c.correct_duplicates = c.padded = c.bucketed = c.transposed = true;
      c.dropout_p = 0.25f;
      c.chunk_size = 24;
      c.look_ahead = 2;
      cases.push_back(c);
    }
    for (const int64_t head_dim : {32, 64}) {  // masks that the wgmma instances know
      for (const bool causal : {true, false}) {
        for (const bool bucketed : {true, false}) {
          for (const bool wrap : {true, false}) {
            Case c = base;
            c.head_dim = head_dim;
            c.causal = causal;
            c.wrap = wrap;
            c.bucketed = bucketed;
            if (bucketed) cases.push_back(c);
            c.dropout_p = 0.25f;
            cases.push_back(c);
            c.padded = c.transposed = true;
            c.mask_self = false;
            cases.push_back(c);
            c = base;
            c.head_dim = head_dim;
            c.causal = causal;
            c.wrap = wrap;
            c.correct_duplicates = true;
            c.bucketed = bucketed;
            cases.push_back(c);
            c.dropout_p = 0.25f;
            cases.push_back(c);
          }
        }
      }
    }
    for (const int64_t head_dim : {64, 128}) {  // flags that the wgmma instances know
      Case c = base;
      c.head_dim = head_dim;
      c.causal = false;
      c.padded = true;
      cases.push_back(c);
      c.mask_self = c.wrap = false;
      c.transposed = true;
      cases.push_back(c);
      c.ordered = false;
      c.rounds = 1;
      cases.push_back(c);
      c.causal = c.mask_self = true;
      cases.push_back(c);
    }
    {
      Case c = base;  // everyone alone: self only, exactly
      c.chunk_size = 1;
      c.look_back = 0;
      c.rounds = 1;
      cases.push_back(c);
      c.mask_self = false;
      c.padded = true;
      cases.push_back(c);
    }
    for (int which = 0; which < 4; ++which) {
      Case c = base;
      (which == 0 ? c.nan_q : which == 1 ? c.nan_k : which == 2 ? c.nan_v : c.nan_grad) = 150;
      c.shared_qk = which == 0;
      c.mask_self = which == 0;
      c.rounds = 1;
      c.chunk_size = 32;
      c.wrap = false;
      cases.push_back(c);
    }
    {
      Case c = base;  // pairs that meet in several rounds and around the seams of short lines
      c.length = 40;
      c.chunk_size = 16;
      c.rounds = 4;
      c.look_back = 3;
      c.look_ahead = 2;
      c.correct_duplicates = true;
      cases.push_back(c);
      c.look_back = 20;
      cases.push_back(c);
      c.bucketed = true;
      cases.push_back(c);
    }
    if (dtype != DType::f16) {  // 1 / eps times a gradient is infinite in fp16
      Case c = base;
      c.zero_row = 7;
      c.causal = false;
      cases.push_back(c);
      c.head_dim = 128;
      cases.push_back(c);
    }
  }
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int64_t head_dim : {32, 64, 128}) {
      Case base;  // local attention
      base.dtype = dtype;
      base.heads = 2;
      base.head_dim = head_dim;
      base.shared_qk = base.ordered = base.mask_self = base.wrap = false;
      for (const int64_t chunk_size : {64, 128, 256}) {
        Case c = base;
        c.chunk_size = chunk_size;
        c.length = 3 * chunk_size;
        c.causal = true;
        cases.push_back(c);
        c.length = 3 * chunk_size + 37;  // a short last chunk, a short last tile
        c.padded = c.transposed = true;
        cases.push_back(c);
        c.causal = false;
        c.look_ahead = 1;
        cases.push_back(c);
        c.look_back = 0;
        c.look_ahead = 0;
        c.padded = c.grad_lse = false;
        cases.push_back(c);
        c.look_back = 2;
        c.mask_self = c.wrap = true;
        cases.push_back(c);
        c.causal = c.padded = true;  // the first query is alone, or has nothing
        c.wrap = false;
        c.batch = 2;
        cases.push_back(c);
        c.wrap = true;
        c.look_back = 1;
        c.look_ahead = 1;
        cases.push_back(c);
      }
      for (const int64_t length : {1, 64, 65, 130}) {  // one chunk, not of whole tiles
        Case c = base;
        c.length = length;
        c.chunk_size = 130;
        cases.push_back(c);
        c.causal = c.mask_self = true;
        cases.push_back(c);
      }
    }
  }
  Case groups;  // more heads than one group's workspace holds
  groups.dtype = DType::f32;
  groups.heads = 350;
  groups.length = 64;
  groups.head_dim = 32;
  groups.rounds = 512;
  groups.checked_heads = {0, 105, 106, 211, 212, 309, 310, 349};
  cases.push_back(groups);
  return cases;
}

// An order with values out of range may give any numbers, but touches no foreign memory.
void run_garbage_order(std::mt19937& generator) {
  Case c;
  c.rounds = 2;
  c.length = 100;
  c.correct_duplicates = c.bucketed = c.padded = true;
  Inputs in(c, generator);
  for (int32_t& x : in.order) x = static_cast<int32_t>(generator());
  const DeviceLists lists(in);
  Outputs outputs(c);
  run(in, lists, outputs);
}

}  // namespace

int main(int argc, char** argv) {
  const int random_cases = argc > 1 ? std::atoi(argv[1]) : 300;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no CUDA device\n");
    return 77;
  }
  std::mt19937 generator(seed);
  std::vector<Case> cases = random_cases > 0 ? corners() : std::vector<Case>{};
  for (int i = 0; i < std::abs(random_cases); ++i) cases.push_back(random_case(generator));
  int failures = 0;
  for (const Case& c : cases) failures += !passes(c, generator);
  run_garbage_order(generator);
  std::printf("%zu cases, %d failures, largest error %.2f of the tolerance\n", cases.size(),
              failures, largest_error);
  return failures == 0 ? 0 : 1;
}

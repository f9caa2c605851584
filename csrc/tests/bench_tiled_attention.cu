// The wgmma and mma.sync main kernels of chunked attention, alone: checks their per-round partials
// against a double-precision host loop over the inputs as rounded, then times them. No torch.
//
//   nvcc -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler -fopenmp -I csrc/kernels
//        csrc/tests/bench_tiled_attention.cu $(find csrc/kernels/chunked_attention -name "*.cu")
//   a.out check | small | time | masks | main | one HEADS LENGTH ROUNDS HEAD_DIM
//   main: the largest target by head dim; small: a few chunks, for compute-sanitizer
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "chunked_attention/stages.h"
#include "common/dropout.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace reformer::kernels;

#define CUDA_CHECK(call)                                                              \
  do {                                                                                \
    const cudaError_t cuda_error = (call);                                            \
    if (cuda_error != cudaSuccess) {                                                  \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(cuda_error)); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

namespace {

constexpr int kChunk = 64;

// The main kernels by one unit of tensor cores.
struct Unit {
  const char* name;
  decltype(&wgmma_supports) supports;
  decltype(&wgmma_forward) forward;
  decltype(&wgmma_backward) backward;
};
constexpr Unit kWgmma{"wgmma", wgmma_supports, wgmma_forward, wgmma_backward};
constexpr Unit kMmaSync{"mma.sync", mma_sync_supports, mma_sync_forward, mma_sync_backward};

struct Case {
  int batch, heads, length, rounds, head_dim;
  DType dtype = DType::bf16;
  bool causal = true, mask_self = true, wrap = true;
  bool natural_order = false, padding = false,
       interleaved = false;  // interleaved: [B, L, H, D] memory
  bool same_bucket = false, correct_duplicates = false;
  double dropout_p = 0.0;
  double norm = 1.0;  // of a row, times sqrt(head_dim)

  int64_t sequences() const { return int64_t{batch} * heads; }
  // The units that have instances for it, on the current device.
  std::vector<Unit> units() const {
    int major = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    std::vector<Unit> result;
    if (major == 9) result.push_back(kWgmma);
    if (head_dim <= 64) result.push_back(kMmaSync);
    return result;
  }
  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof text, "B%d H%d L%d R%d D%d %s%s%s%s%s%s%s%s%s dropout %g norm %g",
                  batch, heads, length, rounds, head_dim, dtype == DType::f16 ? "f16" : "bf16",
                  causal ? " causal" : "", mask_self ? " mask_self" : "", wrap ? " wrap" : "",
                  natural_order ? " natural" : "", padding ? " padding" : "",
                  interleaved ? " interleaved" : "", same_bucket ? " same_bucket" : "",
                  correct_duplicates ? " duplicates" : "", dropout_p, norm);
    return text;
  }
};

uint16_t round_to(DType dtype, double x) {
  uint16_t bits;
  if (dtype == DType::f16) {
    const __half h = __double2half(x);
    std::memcpy(&bits, &h, 2);
  } else {
    const __nv_bfloat16 h = __double2bfloat16(x);
    std::memcpy(&bits, &h, 2);
  }
  return bits;
}

double value_of(DType dtype, uint16_t bits) {
  if (dtype == DType::f16) {
    __half h;
    std::memcpy(static_cast<void*>(&h), &bits, 2);
    return __half2float(h);
  }
  __nv_bfloat16 h;
  std::memcpy(static_cast<void*>(&h), &bits, 2);
  return __bfloat162float(h);
}

// Device memory with guard bands; filled with 0xff bytes (NaNs in every float type).
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    CUDA_CHECK(cudaMalloc(&base_, bytes + 2 * kGuard));
    poison();
  }
  template <typename T>
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size() * sizeof(T)) {
    CUDA_CHECK(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(base_); }
  void poison() { CUDA_CHECK(cudaMemset(base_, 0xff, bytes_ + 2 * kGuard)); }
  void* data() const { return base_ + kGuard; }
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    CUDA_CHECK(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  bool guards_intact() const {
    std::vector<uint8_t> band(2 * kGuard);
    CUDA_CHECK(cudaMemcpy(band.data(), base_, kGuard, cudaMemcpyDeviceToHost));
    CUDA_CHECK(
        cudaMemcpy(band.data() + kGuard, base_ + kGuard + bytes_, kGuard, cudaMemcpyDeviceToHost));
    return std::all_of(band.begin(), band.end(), [](uint8_t byte) { return byte == 0xff; });
  }

 private:
  static constexpr size_t kGuard = 1024;
  uint8_t* base_ = nullptr;
  size_t bytes_;
};

constexpr int64_t kDropoutSeed = 0x123456789abcdef;

struct Problem {
  Case c;
  std::vector<uint16_t> q, v, grad_out;  // in the case's memory layout
  std::vector<int32_t> order, buckets;
  std::vector<uint8_t> padding;
  HeadsView view;  // strides of q, v, grad_out

  Problem(const Case& shape, unsigned seed) : c(shape) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const int64_t elements = c.sequences() * c.length * c.head_dim;
    const auto fill = [&](std::vector<uint16_t>& tensor, double factor) {
      constexpr size_t kDistinct = 1 << 21;  // enough for timing; checks are smaller
      tensor.resize(elements);
      for (size_t i = 0; i < tensor.size(); ++i) {
        tensor[i] = i < kDistinct ? round_to(c.dtype, normal(generator) * factor)
                                  : tensor[i - kDistinct + 64];
      }
    };
    fill(q, c.norm);
    fill(v, 1.0);
    fill(grad_out, 1.0);
    sort_by_buckets(generator);
    if (c.padding) {
      padding.resize(int64_t{c.batch} * c.length);
      for (uint8_t& bit : padding) bit = generator() % 4 == 0;
    }
    const int64_t row = c.interleaved ? int64_t{c.heads} * c.head_dim : c.head_dim;
    view = {nullptr, c.length * c.head_dim * int64_t{c.heads},
            c.interleaved ? c.head_dim : int64_t{c.length} * c.head_dim, row};
  }
  // Random buckets, and the positions sorted by them, as LSH attention makes both.
  void sort_by_buckets(std::mt19937& generator) {
    std::uniform_int_distribution<int> pick(0, std::max(1, 2 * c.length / kChunk) - 1);
    buckets.resize(c.sequences() * c.rounds * c.length);
    for (int& b : buckets) b = pick(generator);
    if (c.natural_order) return;
    order.resize(buckets.size());
#pragma omp parallel for
    for (int64_t line = 0; line < c.sequences() * c.rounds; ++line) {
      const auto begin = order.begin() + line * c.length;
      const int* bucket = &buckets[line * c.length];
      std::iota(begin, begin + c.length, 0);
      std::stable_sort(begin, begin + c.length,
                       [&](int a, int b) { return bucket[a] < bucket[b]; });
    }
  }
  // Of each position in each round.
  std::vector<int32_t> chunk_numbers() const {
    std::vector<int32_t> numbers(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t line = i / c.length, sequence = line / c.rounds, round = line % c.rounds;
      numbers[(sequence * c.length + order[i]) * c.rounds + round] =
          static_cast<int32_t>(i % c.length / kChunk);
    }
    return numbers;
  }
  // Row of sequence s at position i.
  int64_t row(int64_t s, int64_t i) const {
    return s / c.heads * view.stride_b + s % c.heads * view.stride_h + i * view.stride_l;
  }
  std::vector<double> rows(const std::vector<uint16_t>& tensor, int64_t s) const {
    std::vector<double> result(int64_t{c.length} * c.head_dim);
    for (int64_t i = 0; i < c.length; ++i) {
      for (int d = 0; d < c.head_dim; ++d) {
        result[i * c.head_dim + d] = value_of(c.dtype, tensor[row(s, i) + d]);
      }
    }
    return result;
  }
};

struct Reference {
  std::vector<double> out, lse, grad_q, grad_v;  // per-round partials, [B * H, R, L, (D)]
  std::vector<float> key_scale;                  // [B * H, L]
  std::vector<RowStats> stats;                   // [B * H, L]
};

Reference reference(const Problem& problem) {
  const Case& c = problem.c;
  const int L = c.length, R = c.rounds, D = c.head_dim, chunks = (L + kChunk - 1) / kChunk;
  const double scale = 1.0 / std::sqrt(D), infinity = INFINITY;
  const int64_t rows = c.sequences() * R * L;
  Reference ref{std::vector<double>(rows * D),         std::vector<double>(rows),
                std::vector<double>(rows * D),         std::vector<double>(rows * D),
                std::vector<float>(c.sequences() * L), std::vector<RowStats>(c.sequences() * L)};
  for (int64_t s = 0; s < c.sequences(); ++s) {
    const auto q = problem.rows(problem.q, s), v = problem.rows(problem.v, s),
               grad = problem.rows(problem.grad_out, s);
    const uint8_t* padding = c.padding ? &problem.padding[s / c.heads * L] : nullptr;
    const auto position = [&](int round, int slot) {
      return c.natural_order ? slot : problem.order[(s * R + round) * L + slot];
    };
    const auto bucket = [&](int round, int i) { return problem.buckets[(s * R + round) * L + i]; };
    const uint32_t threshold = reformer::dropout_threshold(c.dropout_p);
    const auto dropout_factor = [&](int round, int i, int j) {
      const uint32_t key =
          reformer::dropout_row_key(kDropoutSeed, static_cast<uint32_t>(s), round, i);
      const uint32_t word = reformer::dropout_word(key, reformer::dropout_key_part(j));
      return word < threshold ? 0.0 : 1 / (1 - c.dropout_p);
    };
    const auto dot = [&](const double* a, const double* b) {
      double sum = 0;
      for (int d = 0; d < D; ++d) sum += a[d] * b[d];
      return sum;
    };
    std::vector<double> key(q.size()), key_scale(L);
    for (int i = 0; i < L; ++i) {
      key_scale[i] = 1.0 / std::max(std::sqrt(dot(&q[i * D], &q[i * D])), 1e-12);
      ref.key_scale[s * L + i] = static_cast<float>(key_scale[i]);
      for (int d = 0; d < D; ++d) key[i * D + d] = q[i * D + d] * key_scale[i];
    }
    // Calls visit(round of i, round of j, i, j) for every valid slot, or for a pair's first one.
    const auto for_each_pair = [&](auto visit) {
      std::vector<bool> met(c.correct_duplicates ? int64_t{L} * L : 0);
      for (int line = 0; line < R * chunks; ++line) {
        std::vector<int> window{line};
        if (c.wrap && R * chunks > 1) window.push_back((line + R * chunks - 1) % (R * chunks));
        if (!c.wrap && line % chunks > 0) window.push_back(line - 1);
        for (int a = line % chunks * kChunk; a < std::min(L, (line % chunks + 1) * kChunk); ++a) {
          const int i = position(line / chunks, a);
          for (const int other : window) {
            const int begin = other % chunks * kChunk;
            for (int b = begin; b < std::min(L, begin + kChunk); ++b) {
              const int j = position(other / chunks, b);
              if ((padding != nullptr && padding[j]) || (c.causal && j > i) ||
                  (c.mask_self && j == i))
                continue;
              const int round = line / chunks;
              if (c.same_bucket &&
                  (other / chunks != round || bucket(round, i) != bucket(round, j)))
                continue;
              if (c.correct_duplicates) {
                if (met[int64_t{i} * L + j]) continue;
                met[int64_t{i} * L + j] = true;
              }
              visit(line / chunks, other / chunks, i, j);
            }
          }
        }
      }
    };
    const auto at = [&](int round, int i) { return (s * R + round) * int64_t{L} + i; };
    // Two passes: maxima and sums, then values.
    std::vector<double> maximum(int64_t{R} * L, -infinity), sum(int64_t{R} * L, 0.0);
    const auto logit = [&](int i, int j) { return scale * dot(&q[i * D], &key[j * D]); };
    for_each_pair([&](int round, int, int i, int j) {
      double& m = maximum[round * L + i];
      m = std::max(m, logit(i, j));
    });
    for_each_pair([&](int round, int, int i, int j) {
      const double p = std::exp(logit(i, j) - maximum[round * L + i]);
      sum[round * L + i] += p;
      const double kept = p * dropout_factor(round, i, j);
      for (int d = 0; d < D; ++d) ref.out[at(round, i) * D + d] += kept * v[j * D + d];
    });
    std::vector<double> lse(L, -infinity);
    for (int i = 0; i < L; ++i) {
      double total = 0, top = -infinity;
      for (int r = 0; r < R; ++r) {
        const double z = sum[r * L + i];
        ref.lse[at(r, i)] = z > 0 ? (maximum[r * L + i] + std::log(z)) / std::log(2.0) : -infinity;
        for (int d = 0; d < D && z > 0; ++d) ref.out[at(r, i) * D + d] /= z;
        top = std::max(top, ref.lse[at(r, i)]);
      }
      for (int r = 0; r < R && top > -infinity; ++r) total += std::exp2(ref.lse[at(r, i)] - top);
      lse[i] = total > 0 ? top + std::log2(total) : infinity;
      double delta = 0;
      for (int r = 0; r < R && total > 0; ++r) {
        delta += std::exp2(ref.lse[at(r, i)] - lse[i]) * dot(&grad[i * D], &ref.out[at(r, i) * D]);
      }
      ref.stats[s * L + i] = {static_cast<float>(lse[i]), static_cast<float>(delta),
                              ref.key_scale[s * L + i],
                              padding != nullptr && padding[i] ? 1.0F : 0.0F};
    }
    // A key's gradient belongs to the round its chunk lies in.
    std::vector<double> grad_k(int64_t{R} * L * D, 0.0);
    for_each_pair([&](int query_round, int key_round, int i, int j) {
      const double p = std::exp2(logit(i, j) / std::log(2.0) - lse[i]);
      const double factor = dropout_factor(query_round, i, j);
      const double grad_p = factor * dot(&grad[i * D], &v[j * D]);
      const double ds = p * (grad_p - ref.stats[s * L + i].delta) * scale;
      for (int d = 0; d < D; ++d) {
        ref.grad_v[at(key_round, j) * D + d] += p * factor * grad[i * D + d];
        ref.grad_q[at(query_round, i) * D + d] += ds * key[j * D + d];
        grad_k[(int64_t{key_round} * L + j) * D + d] += ds * q[i * D + d];
      }
    });
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < L; ++j) {
        const double* g = &grad_k[(int64_t{r} * L + j) * D];
        const double along = dot(g, &key[j * D]);
        for (int d = 0; d < D; ++d) {
          ref.grad_q[at(r, j) * D + d] += (g[d] - along * key[j * D + d]) * key_scale[j];
        }
      }
    }
  }
  return ref;
}

// Device copies of a problem, and the parameters that name them.
struct Device {
  Buffer q, v, grad_out, order, buckets, seed, padding, key_scale, stats, chunk_numbers, pair_bits,
      partial_out, partial_lse, partial_q, partial_v;
  ChunkedAttentionBackwardParams params{};
  ForwardStage forward{};
  BackwardStage backward{};

  Device(const Problem& p, const std::vector<float>& scales, const std::vector<RowStats>& row_stats)
      : q(p.q),
        v(p.v),
        grad_out(p.grad_out),
        order(p.order),
        buckets(p.buckets),
        seed(std::vector<int64_t>{kDropoutSeed}),
        padding(p.padding),
        key_scale(scales),
        stats(row_stats),
        chunk_numbers(p.chunk_numbers()),
        pair_bits(pair_bits_bytes(p.c)),
        partial_out(rows(p.c) * p.c.head_dim * 2),
        partial_lse(rows(p.c) * 4),
        partial_q(rows(p.c) * p.c.head_dim * 2),
        partial_v(rows(p.c) * p.c.head_dim * 2) {
    const Case& c = p.c;
    const auto view = [&](const Buffer& buffer) {
      HeadsView result = p.view;
      result.data = buffer.data();
      return result;
    };
    params.q = view(q);
    params.v = params.own_values = view(v);
    params.grad_out = view(grad_out);
    params.order = c.natural_order ? nullptr : static_cast<const int32_t*>(order.data());
    params.buckets = c.same_bucket ? static_cast<const int32_t*>(buckets.data()) : nullptr;
    params.dropout_p = c.dropout_p;
    params.dropout_seed = c.dropout_p > 0 ? static_cast<const int64_t*>(seed.data()) : nullptr;
    params.key_padding_mask = c.padding ? static_cast<const bool*>(padding.data()) : nullptr;
    params.dtype = c.dtype;
    params.batch = c.batch, params.heads = c.heads, params.length = c.length;
    params.head_dim = c.head_dim, params.rounds = c.rounds;
    params.chunk_size = kChunk, params.look_back = 1;
    params.correct_duplicates = c.correct_duplicates;
    params.causal = c.causal, params.mask_self = c.mask_self, params.wrap = c.wrap;
    params.scale = static_cast<float>(1.0 / std::sqrt(c.head_dim));
    // The kernels only read the row statistics there: one head's after the other's.
    const int64_t head_stats = c.length * static_cast<int64_t>(sizeof(RowStats)) / 2;
    params.grad_v = {stats.data(), c.heads * head_stats, head_stats, c.head_dim};
    forward = {0, c.sequences(), static_cast<const float*>(key_scale.data()), partial_out.data(),
               static_cast<float*>(partial_lse.data())};
    backward = {0, c.sequences(), nullptr, partial_q.data(), nullptr, partial_v.data()};
  }
  static int64_t rows(const Case& c) { return c.sequences() * c.rounds * c.length; }
  static int64_t pair_bits_bytes(const Case& c) {
    ChunkedAttentionParams sizes{};
    sizes.rounds = c.rounds, sizes.length = c.length, sizes.dropout_p = c.dropout_p;
    return pair_bits_size(sizes, c.sequences());
  }

  void run_forward(const Unit& unit, const ForwardStage& stage) {
    CUDA_CHECK(unit.forward(params, with_bits(stage, false), nullptr));
  }
  void run_backward(const Unit& unit, const BackwardStage& stage) {
    CUDA_CHECK(unit.backward(params, with_bits(stage, true), nullptr));
  }
  template <typename Stage>
  Stage with_bits(Stage stage, bool keys_in_rows) {
    if (!needs_pair_bits(params)) return stage;
    const auto* numbers = static_cast<const int32_t*>(chunk_numbers.data()) +
                          stage.head_begin * params.rounds * params.length;
    CUDA_CHECK(make_pair_bits(params, stage.head_begin, stage.head_count,
                              corrects_duplicates(params) ? numbers : nullptr, keys_in_rows,
                              pair_bits.data(), nullptr));
    stage.pair_bits = pair_bits.data();
    return stage;
  }

  // All heads, in two stages where there are several, as the entry point may split them.
  void run_in_groups(const Unit& unit) {
    const int64_t first = (params.batch * params.heads + 1) / 2, all = params.batch * params.heads;
    for (int64_t begin = 0; begin < all; begin += first) {
      const int64_t count = std::min(first, all - begin),
                    rows = begin * params.rounds * params.length;
      ForwardStage f = forward;
      f.head_begin = begin, f.head_count = count;
      f.key_scale += begin * params.length;
      f.partial_out = static_cast<uint16_t*>(f.partial_out) + rows * params.head_dim;
      f.partial_lse += rows;
      run_forward(unit, f);
      BackwardStage b = backward;
      b.head_begin = begin, b.head_count = count;
      b.partial_q = static_cast<uint16_t*>(b.partial_q) + rows * params.head_dim;
      b.partial_v = static_cast<uint16_t*>(b.partial_v) + rows * params.head_dim;
      run_backward(unit, b);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
  }
};

// |actual - expected| / |expected|; NaN if any element is.
double relative_error(DType dtype, const std::vector<uint16_t>& actual,
                      const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double x = value_of(dtype, actual[i]);
    difference += (x - expected[i]) * (x - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

double largest_error(const std::vector<float>& actual, const std::vector<double>& expected) {
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (actual[i] == expected[i]) continue;  // -inf
    const double error = std::abs(actual[i] - expected[i]) / std::max(1.0, std::abs(expected[i]));
    if (!(error <= largest)) largest = error;
  }
  return largest;
}

bool check(const Unit& unit, const Problem& problem, const Reference& ref) {
  const Case& c = problem.c;
  Device device(problem, ref.key_scale, ref.stats);
  if (!unit.supports(device.params)) {
    std::printf("FAIL %-8s %s: not supported\n", unit.name, c.name().c_str());
    return false;
  }
  device.run_in_groups(unit);
  const auto out = device.partial_out.read<uint16_t>(), grad_q = device.partial_q.read<uint16_t>(),
             grad_v = device.partial_v.read<uint16_t>();
  const auto lse = device.partial_lse.read<float>();
  bool guards = true, repeated = true;
  for (Buffer* buffer : {&device.partial_out, &device.partial_lse, &device.partial_q,
                         &device.partial_v, &device.pair_bits}) {
    guards = guards && buffer->guards_intact();
    buffer->poison();
  }
  device.run_in_groups(unit);
  repeated = out == device.partial_out.read<uint16_t>() &&
             grad_q == device.partial_q.read<uint16_t>() &&
             grad_v == device.partial_v.read<uint16_t>() &&
             std::memcmp(lse.data(), device.partial_lse.read<float>().data(), lse.size() * 4) == 0;

  const double errors[4] = {relative_error(c.dtype, out, ref.out), largest_error(lse, ref.lse),
                            relative_error(c.dtype, grad_q, ref.grad_q),
                            relative_error(c.dtype, grad_v, ref.grad_v)};
  const double step = c.dtype == DType::f16 ? 1.0 / 8 : 1.0;  // rounding of f16 against bf16
  const double bounds[4] = {4e-3 * step, 1e-5, 7e-3 * step, 5e-3 * step};
  bool passed = guards && repeated;
  for (int i = 0; i < 4; ++i) passed = passed && errors[i] <= bounds[i];
  std::printf("%s %-8s %-75s out %.2e lse %.1e dq %.2e dv %.2e%s%s\n", passed ? "ok  " : "FAIL",
              unit.name, c.name().c_str(), errors[0], errors[1], errors[2], errors[3],
              guards ? "" : " GUARD", repeated ? "" : " NOT REPEATED");
  return passed;
}

// The number of units that fail.
int failures_of(const Problem& problem, const Reference& ref) {
  int failures = 0;
  for (const Unit& unit : problem.c.units()) failures += !check(unit, problem, ref);
  return failures;
}

double median_ms(const std::function<void()>& launch) {
  constexpr int kWarmUps = 3, kRuns = 25;
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kWarmUps + kRuns; ++i) {
    CUDA_CHECK(cudaEventRecord(begin));
    launch();
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUps) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void time_case(const Case& c) {
  const Problem problem(c, 1);
  // Plausible constants suffice: the kernels' time does not depend on them.
  const std::vector<float> key_scale(c.sequences() * c.length, 0.125F);
  const std::vector<RowStats> stats(c.sequences() * c.length, RowStats{10.0F, 0.1F, 0.125F, 0.0F});
  Device device(problem, key_scale, stats);
  for (const Unit& unit : c.units()) {
    const double forward = median_ms([&] { device.run_forward(unit, device.forward); });
    const double backward = median_ms([&] { device.run_backward(unit, device.backward); });
    std::printf("%-8s %-75s forward %.4f ms  backward %.4f ms\n", unit.name, c.name().c_str(),
                forward, backward);
  }
  std::fflush(stdout);
}

Case with(Case c, const std::function<void(Case&)>& change) {
  change(c);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  const Case base{1, 2, 512, 2, 64};
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
      major < 8) {
    std::printf("skipped: needs a GPU of compute capability 8.0\n");
    return 77;
  }
  if (mode == "small") {
    int failures = 0;
    for (const int head_dim : {32, 64, 128}) {
      const Problem problem(
          with(base, [&](Case& c) { c.length = 300, c.padding = true, c.head_dim = head_dim; }), 7);
      failures += failures_of(problem, reference(problem));
    }
    const Problem masked(with(base,
                              [](Case& c) {
                                c.length = 300, c.padding = true;
                                c.same_bucket = true, c.dropout_p = 0.1;
                              }),
                         8);
    failures += failures_of(masked, reference(masked));
    const Problem corrected(
        with(base, [](Case& c) { c.length = 300, c.rounds = 3, c.correct_duplicates = true; }), 9);
    failures += failures_of(corrected, reference(corrected));
    return failures == 0 ? 0 : 1;
  }
  if (mode == "main") {
    for (const int head_dim : {64, 128}) time_case({1, 8, 65536, 8, head_dim});
  }
  if (mode == "masks") {
    for (const int head_dim : {64, 32, 128}) {
      const Case plain{1, 8, 65536, 8, head_dim};
      time_case(plain);
      time_case(with(plain, [](Case& c) { c.same_bucket = true; }));
      time_case(with(plain, [](Case& c) { c.dropout_p = 0.1; }));
      time_case(with(plain, [](Case& c) { c.same_bucket = true, c.dropout_p = 0.1; }));
      time_case(with(plain, [](Case& c) { c.correct_duplicates = true; }));
    }
  }
  if (mode == "time") {
    for (const int head_dim : {64, 128}) {
      for (const int length : {65536, 16384, 4096}) time_case({1, 8, length, 8, head_dim});
    }
    time_case({1, 8, 65536, 4, 64});
    time_case({1, 1, 4096, 8, 64});
    time_case(with({1, 8, 65536, 8, 64}, [](Case& c) { c.causal = false; }));
    time_case(with({1, 8, 65536, 8, 64}, [](Case& c) { c.dtype = DType::f16; }));
    time_case({1, 8, 65536, 8, 32});
    time_case(with({8, 1, 65536, 8, 64}, [](Case& c) { c.padding = true; }));
    time_case(with({1, 8, 65536, 8, 128}, [](Case& c) { c.causal = false; }));
    time_case(with({1, 8, 65536, 8, 128}, [](Case& c) { c.dtype = DType::f16; }));
    for (const int head_dim : {64, 128}) time_case({1, 8, 262144, 8, head_dim});
  }
  if (mode == "one" && argc == 6) {
    time_case({1, std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5])});
  }
  if (mode != "check") return 0;
  std::vector<Case> cases;
  for (const int head_dim : {64, 128}) {
    for (const int length : {256, 257, 300, 1000, 4096}) {
      for (const int rounds : {1, 2, 3, 8}) {
        if (length == 4096 && rounds > 2) continue;
        for (const bool causal : {true, false}) {
          for (const bool wrap : {true, false}) {
            const DType dtype = (length + rounds + causal) % 2 ? DType::bf16 : DType::f16;
            cases.push_back(with(base, [&](Case& c) {
              c.length = length, c.rounds = rounds, c.head_dim = head_dim;
              c.causal = causal, c.wrap = wrap, c.dtype = dtype;
            }));
          }
        }
      }
    }
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const bool causal : {true, false}) {
        const Case typed = with(base, [&](Case& c) {
          c.dtype = dtype, c.causal = causal, c.rounds = 3, c.head_dim = head_dim;
        });
        for (const int length : {1, 63, 64, 65, 128}) {
          cases.push_back(with(typed, [&](Case& c) { c.length = length; }));
          cases.push_back(
              with(typed, [&](Case& c) { c.length = length, c.rounds = 1, c.wrap = false; }));
        }
        cases.push_back(with(typed, [](Case& c) { c.mask_self = false; }));
        cases.push_back(
            with(typed, [](Case& c) { c.padding = true, c.batch = 2, c.length = 333; }));
        cases.push_back(with(typed, [](Case& c) { c.padding = true, c.mask_self = false; }));
        cases.push_back(with(typed, [](Case& c) {
          c.interleaved = true, c.batch = 2, c.heads = 3, c.length = 777;
        }));
        cases.push_back(with(typed, [](Case& c) {
          c.natural_order = true, c.rounds = 1, c.wrap = false, c.length = 999;
        }));
        cases.push_back(with(typed, [](Case& c) { c.natural_order = true, c.rounds = 1; }));
        cases.push_back(with(typed, [](Case& c) { c.norm = 30; }));
        // Around the norm from which on the forward pass takes maxima: both ways within one chunk.
        cases.push_back(with(typed, [](Case& c) { c.norm = c.dtype == DType::f16 ? 2.75 : 28; }));
        cases.push_back(with(typed, [](Case& c) { c.norm = 0.01; }));
        for (const int masked_dim : head_dim == 64 ? std::vector{32, 64} : std::vector{128}) {
          const auto add_masked = [&](const std::function<void(Case&)>& mask) {
            const Case masked = with(with(typed, [&](Case& c) { c.head_dim = masked_dim; }), mask);
            cases.push_back(masked);
            cases.push_back(with(masked, [](Case& c) { c.length = 333, c.wrap = false; }));
            cases.push_back(with(masked, [](Case& c) {
              c.batch = 2, c.length = 700, c.padding = true, c.mask_self = false;
            }));
            cases.push_back(with(masked, [](Case& c) { c.length = 65, c.interleaved = true; }));
            cases.push_back(with(masked, [](Case& c) { c.length = 64, c.norm = 30; }));
            if (masked.correct_duplicates) {
              cases.push_back(with(masked, [](Case& c) { c.rounds = 9; }));
              cases.push_back(with(masked, [](Case& c) { c.rounds = 17, c.length = 130; }));
            } else {
              cases.push_back(with(masked, [](Case& c) {
                c.natural_order = true, c.rounds = 1, c.length = 500, c.norm = 30;
              }));
            }
          };
          for (const double dropout_p : {0.0, 0.1, 0.6}) {
            add_masked([&](Case& c) { c.same_bucket = true, c.dropout_p = dropout_p; });
            if (dropout_p > 0) add_masked([&](Case& c) { c.dropout_p = dropout_p; });
          }
          add_masked([&](Case& c) { c.correct_duplicates = true; });
        }
        if (head_dim == 128) continue;
        cases.push_back(with(typed, [](Case& c) { c.head_dim = 32, c.length = 700; }));
        cases.push_back(
            with(typed, [](Case& c) { c.head_dim = 32, c.interleaved = true, c.padding = true; }));
      }
    }
  }
  std::vector<Problem> problems;
  for (const Case& c : cases) problems.emplace_back(c, static_cast<unsigned>(problems.size()));
  std::vector<Reference> references(problems.size());
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < problems.size(); ++i) references[i] = reference(problems[i]);
  int failures = 0;
  for (size_t i = 0; i < problems.size(); ++i) failures += failures_of(problems[i], references[i]);
  std::printf("%zu cases, %d failed\n", cases.size(), failures);
  return failures == 0 ? 0 : 1;
}

// The launchers of lsh_hash and bucket_sort on raw buffers against loops on the host.
// "small" as argument: small sizes only, for compute-sanitizer. "sort": bucket_sort only. "time":
// times bucket_sort instead.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernels/bucket_sort.h"
#include "../kernels/lsh_hash.h"
#include "../kernels/lsh_hash/instances.h"

namespace {

using reformer::kernels::BucketSortParams;
using reformer::kernels::DType;
using reformer::kernels::LshHashParams;

int failures = 0;

void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAIL %s\n", what.c_str());
  ++failures;
}

// Device memory filled with a poison, between two guard bands that must keep it.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    cuda_check(cudaMalloc(&base_, bytes + 2 * kGuard), "cudaMalloc");
    cuda_check(cudaMemset(base_, kPoison, bytes + 2 * kGuard), "cudaMemset");
  }
  template <typename T>
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size() * sizeof(T)) {
    set(values);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(base_); }

  template <typename T = void>
  T* data() const {
    return reinterpret_cast<T*>(base_ + kGuard);
  }
  template <typename T>
  void set(const std::vector<T>& values) {
    cuda_check(cudaMemcpy(data(), values.data(), bytes_, cudaMemcpyHostToDevice), "copy to device");
  }
  template <typename T>
  std::vector<T> get() const {
    std::vector<T> values(bytes_ / sizeof(T));
    cuda_check(cudaMemcpy(values.data(), data(), bytes_, cudaMemcpyDeviceToHost), "copy to host");
    return values;
  }
  bool guards_kept() const {
    std::vector<unsigned char> bands(2 * kGuard);
    cuda_check(cudaMemcpy(bands.data(), base_, kGuard, cudaMemcpyDeviceToHost), "copy to host");
    cuda_check(
        cudaMemcpy(bands.data() + kGuard, base_ + kGuard + bytes_, kGuard, cudaMemcpyDeviceToHost),
        "copy to host");
    return std::all_of(bands.begin(), bands.end(),
                       [](unsigned char byte) { return byte == kPoison; });
  }

 private:
  static constexpr size_t kGuard = 4096;
  static constexpr unsigned char kPoison = 0xcd;
  unsigned char* base_ = nullptr;
  size_t bytes_;
};

// ---- bucket_sort

// (bucket, position) must rise strictly along every segment, which `length` entries in range can
// only do if they are a permutation.
bool is_stable_order(const std::vector<int32_t>& order, const std::vector<int32_t>& buckets,
                     int64_t length, int64_t n_buckets) {
  for (size_t first = 0; first < order.size(); first += length) {
    int64_t previous = -1;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t position = order[first + i];
      if (position < 0 || position >= length) return false;
      const int64_t bucket = std::clamp<int64_t>(buckets[first + position], 0, n_buckets - 1);
      const int64_t key = bucket << 32 | position;
      if (key <= previous) return false;
      previous = key;
    }
  }
  return true;
}

enum class Fill { uniform, one_bucket, skewed, out_of_range, sorted, reversed };

std::vector<int32_t> random_buckets(int64_t count, int64_t n_buckets, Fill fill, uint32_t seed) {
  std::mt19937 generator(seed);
  const int64_t few = std::max<int64_t>(1, n_buckets / 32);
  std::vector<int32_t> buckets(count);
  for (auto& bucket : buckets) {
    const uint32_t word = generator();
    bucket = static_cast<int32_t>(word % n_buckets);
    if (fill == Fill::one_bucket) bucket = static_cast<int32_t>(n_buckets / 2);
    if (fill == Fill::skewed && word >> 30 != 0) bucket = static_cast<int32_t>(bucket % few);
    if (fill == Fill::out_of_range && word >> 29 == 0) bucket = static_cast<int32_t>(generator());
    const int64_t rising = (&bucket - buckets.data()) * n_buckets / count;
    if (fill == Fill::sorted) bucket = static_cast<int32_t>(rising);
    if (fill == Fill::reversed) bucket = static_cast<int32_t>(n_buckets - 1 - rising);
  }
  return buckets;
}

BucketSortParams sort_params(const Buffer& buckets, const Buffer& order, int64_t segments,
                             int64_t length, int64_t n_buckets) {
  BucketSortParams params{};
  params.buckets = buckets.data<int32_t>();
  params.order = order.data<int32_t>();
  params.segments = segments;
  params.length = length;
  params.n_buckets = n_buckets;
  return params;
}

void test_sort(int64_t segments, int64_t length, int64_t n_buckets, Fill fill) {
  const std::string name =
      "bucket_sort segments=" + std::to_string(segments) + " length=" + std::to_string(length) +
      " n_buckets=" + std::to_string(n_buckets) + " fill=" + std::to_string(static_cast<int>(fill));
  const auto host =
      random_buckets(segments * length, n_buckets, fill, static_cast<uint32_t>(length + n_buckets));
  const Buffer buckets(host), order(host.size() * sizeof(int32_t));
  BucketSortParams params = sort_params(buckets, order, segments, length, n_buckets);
  const Buffer workspace(reformer::kernels::bucket_sort_workspace(params));
  params.workspace = workspace.data();
  cuda_check(reformer::kernels::bucket_sort(params, nullptr), name.c_str());
  cuda_check(cudaDeviceSynchronize(), name.c_str());
  expect(is_stable_order(order.get<int32_t>(), host, length, n_buckets), name + ": wrong order");
  expect(order.guards_kept() && workspace.guards_kept(), name + ": wrote out of bounds");
}

// Medians of the time of one sort of 64 segments, and the bytes of input and output at that time.
void time_sort(int64_t length, int64_t n_buckets, Fill fill) {
  constexpr int kInputs = 3, kSorts = 6, kRepeats = 15;
  constexpr int64_t kSegments = 64;
  std::vector<std::unique_ptr<Buffer>> inputs;
  for (int i = 0; i < kInputs; ++i) {
    inputs.push_back(
        std::make_unique<Buffer>(random_buckets(kSegments * length, n_buckets, fill, i)));
  }
  const Buffer order(kSegments * length * sizeof(int32_t));
  BucketSortParams params = sort_params(*inputs[0], order, kSegments, length, n_buckets);
  const Buffer workspace(reformer::kernels::bucket_sort_workspace(params));
  params.workspace = workspace.data();
  cudaEvent_t start = nullptr, stop = nullptr;
  cuda_check(cudaEventCreate(&start), "event");
  cuda_check(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int repeat = 0; repeat <= kRepeats; ++repeat) {
    cuda_check(cudaEventRecord(start), "event");
    for (int i = 0; i < kSorts; ++i) {
      params.buckets = inputs[i % kInputs]->data<int32_t>();
      cuda_check(reformer::kernels::bucket_sort(params, nullptr), "bucket_sort");
    }
    cuda_check(cudaEventRecord(stop), "event");
    cuda_check(cudaEventSynchronize(stop), "timed sort");
    float ms = 0.0f;
    cuda_check(cudaEventElapsedTime(&ms, start, stop), "event");
    if (repeat > 0) times.push_back(ms / kSorts);  // the first one warms up
  }
  std::sort(times.begin(), times.end());
  const float ms = times[times.size() / 2];
  std::printf("bucket_sort 64 x %lld n_buckets=%lld fill=%d: %.4f ms (least %.4f), %.0f GB/s\n",
              static_cast<long long>(length), static_cast<long long>(n_buckets),
              static_cast<int>(fill), ms, times.front(), kSegments * length * 8 / (ms * 1e6));
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
}

// ---- lsh_hash

struct HashCase {
  int64_t batch, heads, length, head_dim, rounds;
  std::vector<int32_t> factors;
  DType x_dtype = DType::bf16, rotations_dtype = DType::bf16;
  bool shared_rotations = false, mask = false,
       heads_inside = false;  // heads_inside: x is [B, L, H, D]

  std::string name() const {
    const char* types[] = {"f32", "f16", "bf16"};
    std::string text = "lsh_hash";
    for (int64_t n : {batch, heads, length, head_dim, rounds})
      text.append(1, ' ') += std::to_string(n);
    text += " factors";
    for (int32_t factor : factors) text.append(1, ' ') += std::to_string(factor);
    return text.append(1, ' ') + types[static_cast<int>(x_dtype)] + "/" +
           types[static_cast<int>(rotations_dtype)] + (shared_rotations ? " shared" : "") +
           (mask ? " mask" : "") + (heads_inside ? " blhd" : "");
  }
};

struct Stored {
  std::vector<unsigned char> bytes;
  std::vector<float> values;  // as stored
};

Stored store(const std::vector<float>& values, DType dtype) {
  Stored stored{{}, values};
  const auto append = [&](const auto& element) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&element);
    stored.bytes.insert(stored.bytes.end(), bytes, bytes + sizeof(element));
  };
  for (auto& value : stored.values) {
    if (dtype == DType::f16) {
      const __half half = __float2half(value);
      value = __half2float(half);
      append(half);
    } else if (dtype == DType::bf16) {
      const __nv_bfloat16 brain = __float2bfloat16(value);
      value = __bfloat162float(brain);
      append(brain);
    } else {
      append(value);
    }
  }
  return stored;
}

std::vector<float> random_normal(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (auto& value : values) value = normal(generator);
  return values;
}

struct HashInstance {
  const char* name;
  bool (*supports)(const LshHashParams&);
  int64_t (*workspace)(const LshHashParams&);
  cudaError_t (*run)(const LshHashParams&, cudaStream_t);
};
constexpr HashInstance kHashInstances[] = {
    {"chosen", [](const LshHashParams&) { return true; }, reformer::kernels::lsh_hash_workspace,
     reformer::kernels::lsh_hash},
    {"mma.sync", reformer::kernels::lsh_hash_mma_sync_supports,
     reformer::kernels::lsh_hash_mma_sync_workspace, reformer::kernels::lsh_hash_mma_sync},
    {"direct", reformer::kernels::lsh_hash_direct_supports,
     [](const LshHashParams&) { return int64_t{0}; }, reformer::kernels::lsh_hash_direct},
    {"SIMT", [](const LshHashParams&) { return true; },
     [](const LshHashParams&) { return int64_t{0}; }, reformer::kernels::lsh_hash_simt},
};
int64_t hash_runs[std::size(kHashInstances)];

// special: some rows are zeros, NaN, or hold an infinity. integers: exact products with many ties,
// which go to the lowest of the largest columns, with its sign.
enum class Values { normal, special, integers };

// Buckets that do not point at the largest products, those of rows that are not finite aside.
int64_t count_wrong(const HashCase& c, const LshHashParams& params, const Stored& x,
                    const Stored& rotations, const std::vector<uint8_t>& mask, Values kind,
                    const std::vector<int32_t>& got) {
  int64_t columns = 0;
  int32_t padding_bucket = 1;
  for (int32_t factor : c.factors) {
    columns += factor / 2;
    padding_bucket *= factor;
  }
  int64_t wrong = 0;
  std::vector<double> products(columns);
  for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
    const int64_t token = i % c.length, round = i / c.length % c.rounds;
    const int64_t head = i / c.length / c.rounds % c.heads,
                  batch = i / c.length / c.rounds / c.heads;
    if (mask[batch * c.length + token]) {
      wrong += got[i] != padding_bucket;
      continue;
    }
    if (got[i] < 0 || got[i] >= padding_bucket) {
      ++wrong;
      continue;
    }
    const float* row = x.values.data() + batch * params.x_stride_b + head * params.x_stride_h +
                       token * params.x_stride_l;
    if (kind == Values::special &&
        !std::all_of(row, row + c.head_dim, [](float v) { return std::isfinite(v); }))
      continue;
    std::fill(products.begin(), products.end(), 0.0);
    double norm = 0.0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      const float* column =
          rotations.values.data() +
          (((c.shared_rotations ? 0 : head) * c.head_dim + d) * c.rounds + round) * columns;
      for (int64_t j = 0; j < columns; ++j) products[j] += double{row[d]} * column[j];
      norm += double{row[d]} * row[d];
    }
    int32_t bucket = got[i];
    const double* factor_products = products.data();
    for (int32_t factor : c.factors) {
      const int32_t digit = bucket % factor, half = factor / 2;
      const double chosen = digit < half ? factor_products[digit] : -factor_products[digit - half];
      int32_t first = 0;
      for (int32_t j = 1; j < half; ++j) {
        if (std::abs(factor_products[j]) > std::abs(factor_products[first])) first = j;
      }
      const double largest = std::abs(factor_products[first]);
      const bool is_exact = kind == Values::integers || norm == 0.0;
      const int32_t exact_digit = factor_products[first] < 0.0 ? first + half : first;
      if (chosen < largest - 2e-5 * std::sqrt(norm) || (is_exact && digit != exact_digit)) {
        ++wrong;
        break;
      }
      bucket /= factor;
      factor_products += half;
    }
  }
  return wrong;
}

// Every digit must point at the largest product up to rounding of the float32 accumulation, by
// every instance that takes the case.
void test_hash(const HashCase& c, Values values = Values::normal) {
  const int64_t rotation_heads = c.shared_rotations ? 1 : c.heads;
  int64_t columns = 0;
  for (int32_t factor : c.factors) columns += factor / 2;
  std::vector<float> x_values = random_normal(c.batch * c.heads * c.length * c.head_dim, 1);
  if (values == Values::special) {
    for (int64_t i = 0; i < static_cast<int64_t>(x_values.size()); ++i) {
      const int64_t row = i / c.head_dim;
      if (row % 7 == 0) x_values[i] = 0.0f;
      if (row % 7 == 1) x_values[i] = std::numeric_limits<float>::quiet_NaN();
      if (row % 7 == 2 && i % c.head_dim == 3) x_values[i] = std::numeric_limits<float>::infinity();
    }
  }
  std::vector<float> rotation_values =
      random_normal(rotation_heads * c.head_dim * c.rounds * columns, 2);
  if (values == Values::integers) {
    for (auto& value : x_values) value = std::rint(value);
    for (auto& value : rotation_values) value = std::rint(value);
  }
  const Stored x = store(x_values, c.x_dtype),
               rotations = store(rotation_values, c.rotations_dtype);
  std::vector<uint8_t> mask(c.batch * c.length, 0);
  if (c.mask) {
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 5 == 0;
  }
  const Buffer x_device(x.bytes), rotations_device(rotations.bytes), mask_device(mask);
  LshHashParams params{};
  params.x = x_device.data();
  params.x_stride_b = c.heads * c.length * c.head_dim;
  params.x_stride_h = c.heads_inside ? c.head_dim : c.length * c.head_dim;
  params.x_stride_l = c.heads_inside ? c.heads * c.head_dim : c.head_dim;
  params.x_dtype = c.x_dtype;
  params.rotations = rotations_device.data();
  params.rotations_dtype = c.rotations_dtype;
  params.rotation_heads = rotation_heads;
  params.key_padding_mask = c.mask ? mask_device.data<bool>() : nullptr;
  params.batch = c.batch;
  params.heads = c.heads;
  params.length = c.length;
  params.head_dim = c.head_dim;
  params.rounds = c.rounds;
  params.n_factors = static_cast<int>(c.factors.size());
  std::copy(c.factors.begin(), c.factors.end(), params.factors);
  for (size_t i = 0; i < std::size(kHashInstances); ++i) {
    const HashInstance& instance = kHashInstances[i];
    if (!instance.supports(params)) continue;
    ++hash_runs[i];
    const std::string name = c.name() + ' ' + instance.name;
    const Buffer buckets(c.batch * c.heads * c.rounds * c.length * sizeof(int32_t));
    const Buffer workspace(instance.workspace(params));
    params.buckets = buckets.data<int32_t>();
    params.workspace = workspace.data();
    cuda_check(instance.run(params, nullptr), name.c_str());
    cuda_check(cudaDeviceSynchronize(), name.c_str());
    expect(buckets.guards_kept() && workspace.guards_kept(), name + ": wrote out of bounds");
    const std::vector<int32_t> got = buckets.get<int32_t>();
    const int64_t wrong = count_wrong(c, params, x, rotations, mask, values, got);
    expect(wrong == 0,
           name + ": " + std::to_string(wrong) + " of " + std::to_string(got.size()) + " wrong");
  }
}

// ---- A captured graph follows its inputs

void test_graph() {
  constexpr int64_t kSegments = 3, kLength = 5000;
  for (const int64_t n_buckets : {65, 9000}) {
    const auto first = random_buckets(kSegments * kLength, n_buckets, Fill::uniform, 1);
    const auto second = random_buckets(kSegments * kLength, n_buckets, Fill::skewed, 2);
    Buffer buckets(first);
    const Buffer order(first.size() * sizeof(int32_t));
    BucketSortParams params = sort_params(buckets, order, kSegments, kLength, n_buckets);
    const Buffer workspace(reformer::kernels::bucket_sort_workspace(params));
    params.workspace = workspace.data();
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda_check(cudaStreamCreate(&stream), "stream");
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    cuda_check(reformer::kernels::bucket_sort(params, stream), "bucket_sort in capture");
    cuda_check(cudaStreamEndCapture(stream, &graph), "capture");
    cuda_check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
    for (const auto& host : {first, second}) {
      buckets.set(host);
      cuda_check(cudaGraphLaunch(executable, stream), "replay");
      cuda_check(cudaStreamSynchronize(stream), "replay");
      expect(is_stable_order(order.get<int32_t>(), host, kLength, n_buckets),
             "bucket_sort: wrong order in replay");
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

void test_invalid_arguments() {
  LshHashParams hash{};
  hash.batch = hash.heads = hash.length = hash.head_dim = hash.rounds = hash.rotation_heads = 1;
  hash.n_factors = 1;
  hash.factors[0] = 3;
  expect(reformer::kernels::lsh_hash(hash, nullptr) == cudaErrorInvalidValue,
         "lsh_hash: accepts an odd factor");
  BucketSortParams sort{};
  sort.segments = sort.length = 1;
  expect(reformer::kernels::bucket_sort(sort, nullptr) == cudaErrorInvalidValue,
         "bucket_sort: accepts 0 buckets");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool small = mode == "small";
  if (mode == "time") {
    for (const int64_t length : {65536, 262144, 1048576}) {
      time_sort(length, length / 32, Fill::uniform);
    }
    for (const Fill fill : {Fill::one_bucket, Fill::skewed, Fill::sorted, Fill::reversed}) {
      time_sort(262144, 8192, fill);
    }
    // Both sides of the border between one pass and two.
    for (const int64_t n_buckets : {2048, 4096, 6000}) {
      time_sort(262144, n_buckets, Fill::uniform);
    }
    return 0;
  }

  for (const Fill fill : {Fill::uniform, Fill::one_bucket, Fill::skewed, Fill::out_of_range,
                          Fill::sorted, Fill::reversed}) {
    for (const int64_t n_buckets : {1, 2, 65, 513, 2049, 4097, 32769}) {
      for (const int64_t length : {1, 31, 1000, 4097}) test_sort(3, length, n_buckets, fill);
    }
    for (const int64_t n_buckets : {65537, (1 << 20) + 1}) test_sort(2, 9001, n_buckets, fill);
    if (small) continue;
    for (const int64_t n_buckets : {513, 2048, 2049, 4097, 8193, 65537}) {
      for (const int64_t length : {16384, 32769, 70003}) test_sort(9, length, n_buckets, fill);
    }
    // Records that are full: 10 bits of the bucket and 22 of the position, 11 and 21.
    test_sort(1, (1 << 22) - 5, 1 << 17, fill);
    test_sort(1, 1 << 21, 1 << 19, fill);
    test_sort(64, 16384, 513, fill);
    test_sort(64, 65536, 2049, fill);
    test_sort(8, 262144, 2049, fill);
    test_sort(40, 200001, 300, fill);
    test_sort(4, 300007, 32769, fill);
    test_sort(5, 262144, 8192, fill);
    test_sort(3, 262145, 8192, fill);
    test_sort(2, 8192 * 3 + 4, 8192, fill);
    test_sort(2, 1048576, 32768, fill);
    test_sort(2, 1048573, 32768, fill);
  }
  if (!small) {
    test_sort(64, 262144, 8192, Fill::uniform);
    test_sort(1, 5'000'011, 65536, Fill::uniform);
    test_sort(1, 5'000'011, (1 << 20) + 1, Fill::skewed);
    test_sort(1, (1 << 24) + 77, 3000, Fill::uniform);
    test_sort(1, (1 << 24) + 77, 40000, Fill::uniform);
    test_sort(18, 4'000'000, 70000, Fill::uniform);  // sorted in groups of segments
  }
  std::printf("bucket_sort done\n");
  if (mode == "sort") {
    test_graph();
    std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
    return failures == 0 ? 0 : 1;
  }

  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    HashCase c{2, 3, 333, 64, 4, {32, 64}, dtype, dtype};
    test_hash(c);
    c.mask = c.heads_inside = true;
    test_hash(c);
    test_hash(c, Values::special);
    c.shared_rotations = true;
    test_hash(c);
    for (const int64_t head_dim : {8, 16, 24, 32, 40, 64, 72, 128, 136, 256}) {
      test_hash({1, 2, 130, head_dim, 3, {16, 10}, dtype, dtype});
      test_hash({2, 3, 77, head_dim, 2, {32, 64}, dtype, dtype, false, true, true});
    }
    for (int64_t rounds = 1; rounds <= 9; ++rounds) {
      test_hash({1, 2, 101, 64, rounds, {6, 10}, dtype, dtype});
      test_hash({2, 1, 67, 64, rounds, {32, 64}, dtype, dtype, true});
    }
    test_hash({1, 3, 5, 32, 9, {6, 10, 34, 2}, dtype, dtype});
    for (const int64_t head_dim : {8, 32, 64, 128, 256}) {
      test_hash({1, 2, 150, head_dim, 3, {32, 64}, dtype, dtype}, Values::integers);
      test_hash({1, 2, 150, head_dim, 3, {6, 10, 100}, dtype, dtype}, Values::integers);
    }
    // The factors that the tensor-core kernels know, and neighbours in number of tiles.
    for (const auto& factors : std::vector<std::vector<int32_t>>{{16, 16},
                                                                 {10, 20},
                                                                 {32, 32},
                                                                 {18, 64},
                                                                 {64, 64},
                                                                 {6, 16, 20},
                                                                 {32, 32, 20},
                                                                 {16, 64},
                                                                 {16, 16, 16}}) {
      for (const int64_t head_dim : {32, 64, 128}) {
        test_hash({1, 2, 97, head_dim, 3, factors, dtype, dtype}, Values::special);
      }
    }
    for (const auto& factors : std::vector<std::vector<int32_t>>{{2},
                                                                 {4, 2},
                                                                 {2, 2, 2, 2, 2, 2, 2, 2},
                                                                 {16, 32},
                                                                 {16, 16, 32},
                                                                 {32, 32, 32},
                                                                 {6, 100, 14},
                                                                 {64, 128},
                                                                 {600}}) {
      test_hash({1, 2, 97, 64, 5, factors, dtype, dtype}, Values::special);
    }
    for (const int64_t length : {1, 63, 64, 65, 127, 1000})
      test_hash({1, 1, length, 64, 1, {34, 64}, dtype, dtype});
    for (int64_t length = 1; length <= 9; ++length) {  // decoding, and the first that is not
      test_hash({1, 16, length, 64, 8, {128, 256}, dtype, dtype, false, true, true});
      test_hash({3, 2, length, 128, 8, {8, 8}, dtype, dtype});
    }
    test_hash(
        {1, 2, 65, 64, 40, {64, 128}, dtype, dtype});     // more rounds than fit in shared memory
    test_hash({1, 1, 65, 128, 1, {6000}, dtype, dtype});  // a factor that does not fit
    test_hash({3, 2, 70, 48, 2, {16, 16}, dtype, DType::f32, false, true});
    if (!small) {  // heads that share blocks and blocks that share a head, whole and in part
      test_hash({1, 8, 4096, 64, 8, {32, 64}, dtype, dtype});
      test_hash({2, 3, 11003, 32, 2, {16, 16}, dtype, dtype});
      test_hash({1, 300, 170, 16, 1, {6}, dtype, dtype});
    }
  }
  test_hash({1, 2, 77, 5, 2, {16, 16}, DType::f32, DType::f32});
  test_hash({1, 2, 77, 33, 2, {16, 16}, DType::f32, DType::bf16});
  std::printf("lsh_hash done:");
  for (size_t i = 0; i < std::size(kHashInstances); ++i) {
    std::printf(" %s %lld", kHashInstances[i].name, static_cast<long long>(hash_runs[i]));
  }
  std::printf("\n");

  test_graph();
  test_invalid_arguments();
  std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

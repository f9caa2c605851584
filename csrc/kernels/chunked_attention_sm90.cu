// Where the wgmma instances of chunked attention apply.
#include <atomic>

#include "chunked_attention_sm90.cuh"

namespace reformer::kernels {
namespace sm90 {
namespace {

// Compiled with a launch bound of one warpgroup only where the target has wgmma, so that its
// attributes tell whether this build's code for the current device does.
#ifdef REFORMER_SM90A
constexpr int kProbeThreads = kThreads;
#else
constexpr int kProbeThreads = 32;
#endif
__global__ __launch_bounds__(kProbeThreads) void wgmma_probe() {}

struct DeviceTraits {
  bool has_wgmma;
  int multiprocessors;
};

cudaError_t query_device(int device, DeviceTraits* traits) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&traits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  traits->has_wgmma = false;
  if (major == 9 && minor == 0) {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, wgmma_probe);
    if (error != cudaSuccess) return error;
    traits->has_wgmma = attributes.maxThreadsPerBlock == kThreads;
  }
  return cudaSuccess;
}

// The current device's traits, queried once per device.
cudaError_t current_device(DeviceTraits* traits) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];  // 0: not queried; else 2 * multiprocessors + has_wgmma
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kDevices) {
    if (const int cached = cache[device].load(std::memory_order_relaxed); cached != 0) {
      *traits = {cached % 2 == 1, cached / 2};
      return cudaSuccess;
    }
  }
  error = query_device(device, traits);
  if (error == cudaSuccess && device < kDevices) {
    cache[device].store(2 * traits->multiprocessors + traits->has_wgmma, std::memory_order_relaxed);
  }
  return error;
}

}  // namespace

cudaError_t multiprocessor_count(int* count) {
  DeviceTraits traits{};
  const cudaError_t error = current_device(&traits);
  *count = traits.multiprocessors;
  return error;
}

}  // namespace sm90

bool sm90_supports(const ChunkedAttentionParams& params) {
  const int64_t dim = params.head_dim;
  const bool sizes = (dim == 32 || dim == 64 || dim == 128) && params.chunk_size == 64 &&
                     params.look_back == 1 && params.look_ahead == 0 &&
                     params.length < (int64_t{1} << 30) &&
                     params.rounds * (params.length / 64 + 1) < (int64_t{1} << 30) &&
                     params.batch * params.heads < (int64_t{1} << 16);
  const bool flags = (params.dtype == DType::f16 || params.dtype == DType::bf16) &&
                     params.k.data == nullptr && params.buckets == nullptr &&
                     !params.correct_duplicates && params.dropout_p == 0.0F && params.scale > 0.0F;
  const bool strides =
      params.q.stride_l <= sm90::kLargestRowStride && params.v.stride_l <= sm90::kLargestRowStride;
  if (!sizes || !flags || !strides) return false;
  // Wrapping a line of one chunk would count that chunk twice.
  if (params.wrap && params.rounds == 1 && params.length <= params.chunk_size) return false;
  sm90::DeviceTraits traits{};
  return sm90::current_device(&traits) == cudaSuccess && traits.has_wgmma;
}

}  // namespace reformer::kernels

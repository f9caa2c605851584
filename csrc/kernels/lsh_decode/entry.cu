#include <algorithm>
#include <cfloat>
#include <cmath>

#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "lsh_decode.h"
#include "tensor_core/mma.cuh"

namespace reformer::kernels {
namespace {

constexpr unsigned kAllLanes = 0xffffffffU;

// Row t of a head; heads are counted through the batch.
template <typename T>
__device__ __forceinline__ T* row_of(const NewRows& rows, int64_t head, int64_t heads, int64_t t) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + head / heads * rows.stride_b +
         head % heads * rows.stride_h + t * rows.stride_t;
}

// ---- Decoding
//
// A block attends for one query. Its slots, W of every round, go round among groups of kLanes
// lanes, each of which reads whole rows and keeps a softmax of its own; these are merged in a fixed
// order.

constexpr int kMaxDecodeThreads = 512;
constexpr int kVectorsAhead = 8;  // of keys, and of values, that a lane loads at once

// What a query may attend to: slot i of the table, seen from the query's buckets.
struct Slots {
  const int32_t *table, *counts, *buckets;  // of the head and the query
  int64_t queries, n_buckets, window;
  int32_t end;  // of the positions that may be found, which fit an int
  int count;

  __device__ Slots(const LshDecodeParams& params, int64_t head, int64_t t)
      : table(params.table + head * params.rounds * params.n_buckets * params.window),
        counts(params.counts + head * params.rounds * params.n_buckets),
        buckets(params.buckets + head * params.rounds * params.queries + t),
        queries(params.queries),
        n_buckets(params.n_buckets),
        window(params.window),
        end(static_cast<int32_t>(min(params.capacity, int64_t{INT32_MAX}))),
        count(static_cast<int>(params.rounds * params.window)) {
    if (params.before == nullptr) return;
    const int64_t own = params.before[head / params.heads] + t;
    end = static_cast<int32_t>(max(min(own, int64_t{end}), int64_t{0}));
  }

  // The position in a slot; -1: none.
  __device__ __forceinline__ int32_t operator[](int i) const {
    const int round = i / static_cast<int>(window), slot = i - round * static_cast<int>(window);
    const int32_t bucket = buckets[round * queries];
    if (bucket < 0 || bucket >= n_buckets) return -1;
    const int64_t place = round * n_buckets + bucket;
    if (slot >= counts[place]) return -1;
    const int32_t position = table[place * window + slot];
    return position < end ? max(position, -1) : -1;
  }
};

// The first slot of each position: a hash table with linear probing. The threads race for its
// places, but not for what it says.
struct FirstSlots {
  static constexpr int kPlacesPerSlot = 2;
  int32_t *positions, *slots;  // [places]
  uint32_t places;

  __device__ FirstSlots(void* memory, int slot_count)
      : positions(static_cast<int32_t*>(memory)),
        slots(positions + kPlacesPerSlot * int64_t{slot_count}),
        places(kPlacesPerSlot * static_cast<uint32_t>(slot_count)) {}

  static __host__ __device__ int64_t bytes(int64_t slot_count) {
    return 2 * kPlacesPerSlot * slot_count * static_cast<int64_t>(sizeof(int32_t));
  }

  // By the whole block, which then sees the table.
  __device__ void fill(const Slots& all) {
    for (uint32_t i = threadIdx.x; i < places; i += blockDim.x) {
      positions[i] = -1;
      slots[i] = INT32_MAX;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all.count; i += blockDim.x) {
      const int32_t position = all[i];
      if (position < 0) continue;
      uint32_t place = home(position);
      for (;;) {
        const int32_t there = atomicCAS(positions + place, -1, position);
        if (there == -1 || there == position) break;
        place = after(place);
      }
      atomicMin(slots + place, i);
    }
    __syncthreads();
  }

  // Of a position that is in the table.
  __device__ __forceinline__ int slot_of(int32_t position) const {
    uint32_t place = home(position);
    while (positions[place] != position) place = after(place);
    return slots[place];
  }

 private:
  __device__ __forceinline__ uint32_t home(int32_t position) const {
    return __umulhi(static_cast<uint32_t>(position) * 0x9e3779b1U, places);
  }
  __device__ __forceinline__ uint32_t after(uint32_t place) const {
    return place + 1 < places ? place + 1 : 0;
  }
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, bool valid) {
  const uint4 bits = valid ? __ldg(reinterpret_cast<const uint4*>(row)) : make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const Vector<T>*>(&bits);
}

// A softmax over some of the keys and what it weighs of the values: the elements that a lane holds.
// Starts out far below any logit instead of at -inf, whose difference is not a number.
template <int kElements>
struct Softmax {
  float peak = -FLT_MAX, total = 0;
  float sums[kElements] = {};

  __device__ __forceinline__ void raise(float new_peak) {
    const float factor = expf(peak - new_peak);
    peak = new_peak;
    total *= factor;
#pragma unroll
    for (float& sum : sums) sum *= factor;
  }

  // Of this lane and the one `offset` away, in both.
  __device__ __forceinline__ void merge(int offset) {
    raise(fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, offset)));
    total += __shfl_xor_sync(kAllLanes, total, offset);
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
};

// Lane l of a group holds the vectors l, l + kLanes, ... of a row, kVectors of them.
template <typename T, int kLanes, int kVectors>
__global__ __launch_bounds__(kMaxDecodeThreads) void decode_kernel(
    const __grid_constant__ LshDecodeParams params) {
  constexpr int kWidth = Vector<T>::kWidth, kElements = kVectors * kWidth;
  constexpr int kSlotsAhead = kVectorsAhead / kVectors;
  constexpr int kMaxWarps = kMaxDecodeThreads / 32;
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float warp_peaks[kMaxWarps], warp_totals[kMaxWarps];
  const int64_t head = blockIdx.x / params.queries, t = blockIdx.x % params.queries;
  const int head_dim = static_cast<int>(params.head_dim);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int groups = blockDim.x / kLanes;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const Slots slots(params, head, t);
  void* const first_slot_memory = params.workspace != nullptr
                                      ? static_cast<unsigned char*>(params.workspace) +
                                            blockIdx.x * FirstSlots::bytes(slots.count)
                                      : shared;
  FirstSlots first_slots(first_slot_memory, slots.count);
  if (params.correct_duplicates) first_slots.fill(slots);

  int column[kVectors];
  float q[kElements];
  const T* q_row = row_of<const T>(params.q, head, params.heads, t);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    column[v] = (v * kLanes + lane) * kWidth;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      q[v * kWidth + e] =
          column[v] < head_dim ? to_float(q_row[column[v] + e]) * params.scale : 0.0f;
    }
  }

  const T* keys = static_cast<const T*>(params.keys) + head * params.capacity * head_dim;
  const T* values = static_cast<const T*>(params.values) + head * params.capacity * head_dim;
  Softmax<kElements> softmax;
  bool found = false;
  // All groups of a warp take as many turns, for the sake of the shuffles.
  for (int first = 0; first < slots.count; first += groups * kSlotsAhead) {
    int32_t position[kSlotsAhead];
    Vector<T> key[kSlotsAhead][kVectors], value[kSlotsAhead][kVectors];
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      const int slot = first + i * groups + group;
      position[i] = slot < slots.count ? slots[slot] : -1;
      if (params.correct_duplicates && position[i] >= 0 &&
          first_slots.slot_of(position[i]) != slot) {
        position[i] = -1;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool valid = position[i] >= 0 && column[v] < head_dim;
        const int64_t offset = int64_t{position[i]} * head_dim + column[v];
        key[i][v] = load_vector(keys + offset, valid);
        value[i][v] = load_vector(values + offset, valid);
      }
    }
    float logits[kSlotsAhead];
    float peak = softmax.peak;
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      float dot = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          dot = fmaf(q[v * kWidth + e], to_float(key[i][v].x[e]), dot);
        }
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, offset);
      }
      logits[i] = dot;
      if (position[i] >= 0) peak = fmaxf(peak, dot);
    }
    softmax.raise(peak);
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      if (position[i] < 0) continue;
      found = true;
      const float weight = expf(logits[i] - peak);
      softmax.total += weight;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          float& sum = softmax.sums[v * kWidth + e];
          sum = fmaf(weight, to_float(value[i][v].x[e]), sum);
        }
      }
    }
  }

#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) softmax.merge(offset);
  const bool any = __syncthreads_or(found);             // and nobody looks for duplicates any more
  float* warp_sums = reinterpret_cast<float*>(shared);  // [warps, D]
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column[v] < head_dim) {
          warp_sums[warp * head_dim + column[v] + e] = softmax.sums[v * kWidth + e];
        }
      }
    }
    if (lane == 0) {
      warp_peaks[warp] = softmax.peak;
      warp_totals[warp] = softmax.total;
    }
  }
  __syncthreads();

  float peak = warp_peaks[0], total = 0;
  for (int w = 1; w < warps; ++w) peak = fmaxf(peak, warp_peaks[w]);
  for (int w = 0; w < warps; ++w) total += warp_totals[w] * expf(warp_peaks[w] - peak);
  const bool has_own = params.own_values.data != nullptr;
  T* out = row_of<T>(params.out, head, params.heads, t);
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
    if (any) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) {
        sum += warp_sums[w * head_dim + d] * expf(warp_peaks[w] - peak);
      }
      out[d] = from_float<T>(sum / total);
    } else {
      out[d] = has_own ? row_of<const T>(params.own_values, head, params.heads, t)[d]
                       : from_float<T>(0.0f);
    }
  }
  if (threadIdx.x == 0) {
    params.lse[blockIdx.x] = any ? peak + logf(total) : has_own ? params.self_only_lse : -INFINITY;
  }
}

// Threads of a block, and its dynamic shared memory with and without the table of first slots.
struct DecodePlan {
  int threads;
  int64_t shared;
  bool workspace;
};

int lanes_of(const LshDecodeParams& params) {
  const int64_t vectors = params.head_dim * (params.dtype == DType::f32 ? 4 : 2) / 16;
  int lanes = 4;
  while (lanes < std::min<int64_t>(vectors, 32)) lanes *= 2;
  return lanes;
}

bool valid(const LshDecodeParams& params) {
  return params.batch >= 0 && params.heads >= 0 && params.queries >= 0 && params.head_dim >= 8 &&
         params.head_dim <= 256 && params.head_dim % 8 == 0 && params.capacity >= 1 &&
         params.rounds >= 1 && params.n_buckets >= 1 && params.window >= 1 &&
         params.rounds <= kMaxDecodeSlots / params.window &&
         params.batch * params.heads * params.queries <= INT32_MAX;
}

cudaError_t make_plan(const LshDecodeParams& params, DecodePlan* plan) {
  DeviceTraits traits{};
  const cudaError_t error = current_device_traits(&traits);
  if (error != cudaSuccess) return error;
  const int64_t slots = params.rounds * params.window;
  const int64_t wanted = ceil_div<int64_t>(slots, kVectorsAhead) * lanes_of(params);
  plan->threads =
      static_cast<int>(round_up<int64_t>(std::min<int64_t>(wanted, kMaxDecodeThreads), 32));
  plan->shared = plan->threads / 32 * params.head_dim * static_cast<int64_t>(sizeof(float));
  plan->workspace = false;
  if (params.correct_duplicates) {
    constexpr int64_t kStatic = 1024;  // of the kernel, and what the system takes
    const int64_t bytes = FirstSlots::bytes(slots);
    plan->workspace = bytes > traits.shared_memory - kStatic;
    if (!plan->workspace) plan->shared = std::max(plan->shared, bytes);
  }
  return cudaSuccess;
}

template <typename T, int kLanes, int kVectors>
cudaError_t launch_decode(const LshDecodeParams& params, const DecodePlan& plan,
                          cudaStream_t stream) {
  const auto kernel = decode_kernel<T, kLanes, kVectors>;
  const int bytes = static_cast<int>(plan.shared);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(params.batch * params.heads * params.queries);
  return launch_overlapped(kernel, {blocks, plan.threads, bytes}, stream, params);
}

template <typename T>
cudaError_t launch_decode(const LshDecodeParams& params, const DecodePlan& plan,
                          cudaStream_t stream) {
  switch (lanes_of(params)) {
    case 4:
      return launch_decode<T, 4, 1>(params, plan, stream);
    case 8:
      return launch_decode<T, 8, 1>(params, plan, stream);
    case 16:
      return launch_decode<T, 16, 1>(params, plan, stream);
    case 32:
      if constexpr (sizeof(T) == 4) {
        if (params.head_dim > 128) return launch_decode<T, 32, 2>(params, plan, stream);
      }
      return launch_decode<T, 32, 1>(params, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t lsh_decode_workspace(const LshDecodeParams& params) {
  DecodePlan plan{};
  if (!valid(params) || make_plan(params, &plan) != cudaSuccess || !plan.workspace) return 0;
  return params.batch * params.heads * params.queries *
         FirstSlots::bytes(params.rounds * params.window);
}

cudaError_t lsh_decode(const LshDecodeParams& given, cudaStream_t stream) {
  if (!valid(given)) return cudaErrorInvalidValue;
  if (given.batch * given.heads * given.queries == 0) return cudaSuccess;
  DecodePlan plan{};
  const cudaError_t error = make_plan(given, &plan);
  if (error != cudaSuccess) return error;
  LshDecodeParams params = given;
  if (!plan.workspace) params.workspace = nullptr;
  return dispatch_dtype(params.dtype,
                        [&](auto x) { return launch_decode<decltype(x)>(params, plan, stream); });
}

// ---- Growth

namespace {

constexpr int kAppendThreads = 128;

__device__ __forceinline__ bool has_room(int64_t position, int64_t capacity) {
  return position >= 0 && position < capacity;
}

constexpr int kRowLanes = 8;  // copy a row together

// A lane's vectors of a row [D], D <= 256.
template <typename T>
struct RowShare {
  static constexpr int kWidth = Vector<T>::kWidth, kVectors = 256 / (kWidth * kRowLanes);
  Vector<T> vectors[kVectors];

  // Calls body(vector, its first element's place).
  template <typename Body>
  __device__ __forceinline__ void for_each(int head_dim, Body body) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int d = (i * kRowLanes + static_cast<int>(threadIdx.x) % kRowLanes) * kWidth;
      if (d < head_dim) body(vectors[i], d);
    }
  }
  __device__ __forceinline__ void load(const T* row, int head_dim) {
    for_each(head_dim, [&](Vector<T>& vector, int d) {
      vector = *reinterpret_cast<const Vector<T>*>(row + d);
    });
  }
  __device__ __forceinline__ void store(T* row, int head_dim) {
    for_each(head_dim, [&](const Vector<T>& vector, int d) {
      *reinterpret_cast<Vector<T>*>(row + d) = vector;
    });
  }
  // Brings the row to length one. All lanes of the warp take part.
  __device__ __forceinline__ void normalize(int head_dim) {
    float squares = 0;
    for_each(head_dim, [&](const Vector<T>& vector, int) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float x = to_float(vector.x[e]);
        squares = fmaf(x, x, squares);
      }
    });
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(kAllLanes, squares, offset);
    }
    const float norm = fmaxf(sqrtf(squares), 1e-12f);
    for_each(head_dim, [&](Vector<T>& vector, int) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        vector.x[e] = from_float<T>(to_float(vector.x[e]) / norm);
      }
    });
  }
};

// One warp enters the new positions of a head and round, 32 at a time.
__device__ __forceinline__ void count_line(const LshCacheAppendParams& params, int64_t line) {
  const int lane = threadIdx.x % 32;
  const int64_t begin = params.lengths[line / (params.heads * params.rounds)];
  const int32_t* buckets = params.buckets + line * params.rows;
  int32_t* counts = params.counts + line * params.n_buckets;
  int32_t* table = params.table + line * params.n_buckets * params.window;
  for (int64_t first = 0; first < params.rows; first += 32) {
    const int64_t t = first + lane, position = begin + t;
    int32_t bucket = t < params.rows ? buckets[t] : -1;
    if (bucket < 0 || bucket >= params.n_buckets || !has_room(position, params.capacity)) {
      bucket = -1;
    }
    const unsigned peers = __match_any_sync(kAllLanes, bucket);
    const int before = __popc(peers & ((1U << lane) - 1)), all = __popc(peers);
    const int32_t held = bucket >= 0 ? max(counts[bucket], 0) : 0;
    __syncwarp();  // all have read their counts
    if (bucket >= 0) {
      const int32_t number = held + before;
      if (before + params.window >= all) {  // else a peer would overwrite the slot
        table[bucket * params.window + number % params.window] = static_cast<int32_t>(position);
      }
      if (before + 1 == all) counts[bucket] = number + 1;
    }
    __syncwarp();
  }
}

// Mixing of values as they come; see LshCacheAppendParams.
template <typename T>
struct NextValues {
  const LshCacheAppendParams& params;
  int64_t head;
  float own, next;

  __device__ NextValues(const LshCacheAppendParams& params, int64_t head)
      : params(params),
        head(head),
        own(params.value_mix[head % params.heads]),
        next(params.value_mix[params.heads + head % params.heads]) {}

  __device__ __forceinline__ bool is_padding(int64_t t) const {
    const int32_t bucket = params.buckets[head * params.rounds * params.rows + t];
    return bucket < 0 || bucket >= params.n_buckets;
  }
  __device__ __forceinline__ const T* row(int64_t t) const {
    return row_of<const T>(params.v, head, params.heads, t);
  }
  __device__ __forceinline__ T* last() const {
    return static_cast<T*>(params.last_values) + head * params.head_dim;
  }

  // row * own + other * next, in `row`.
  __device__ __forceinline__ void mix(RowShare<T>& row, const RowShare<T>& other) const {
#pragma unroll
    for (int i = 0; i < RowShare<T>::kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < RowShare<T>::kWidth; ++e) {
        T& x = row.vectors[i].x[e];
        x = from_float<T>(fmaf(next, to_float(other.vectors[i].x[e]), own * to_float(x)));
      }
    }
  }

  // v: row t as it came.
  __device__ __forceinline__ void mix_with_next(RowShare<T>& v, int64_t t, int head_dim) const {
    if (t + 1 >= params.rows || is_padding(t)) return;
    RowShare<T> other = v;
    if (!is_padding(t + 1)) other.load(row(t + 1), head_dim);
    mix(v, other);
  }

  // By the kRowLanes lanes of row 0, which becomes `position`.
  __device__ __forceinline__ void complete_last(int64_t position) const {
    const int head_dim = static_cast<int>(params.head_dim);
    RowShare<T> value, other;
    if (has_room(position - 1, params.capacity)) {
      value.load(last(), head_dim);
      other = value;
      if (!is_padding(0)) other.load(row(0), head_dim);
      mix(value, other);
      const int64_t place = (head * params.capacity + position - 1) * params.head_dim;
      value.store(static_cast<T*>(params.values) + place, head_dim);
    }
    const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
    const unsigned first_lane = threadIdx.x % 32 - lane;
    const unsigned lanes = ((1U << kRowLanes) - 1) << first_lane;
    for (int64_t end = params.rows; end > 0; end -= kRowLanes) {  // a lane looks at a row
      const int64_t t = end - 1 - lane;
      const unsigned found = __ballot_sync(lanes, t >= 0 && !is_padding(t)) >> first_lane;
      if (found == 0) continue;
      other.load(row(end - __ffs(static_cast<int>(found))), head_dim);
      other.store(last(), head_dim);
      return;
    }
  }
};

constexpr int kRowsPerWarp = 32 / kRowLanes;

// A warp for each kRowsPerWarp rows and, unless there is an order, for each head and round.
template <typename T, bool kMixed>
__global__ __launch_bounds__(kAppendThreads) void append_kernel(
    const __grid_constant__ LshCacheAppendParams params) {
  wait_for_previous_kernel();
  const int64_t warp = (int64_t{blockIdx.x} * kAppendThreads + threadIdx.x) / 32;
  const int64_t heads = params.batch * params.heads, rows = heads * params.rows;
  const int64_t row_warps = ceil_div<int64_t>(rows, kRowsPerWarp);
  if (warp >= row_warps) {
    const int64_t line = warp - row_warps;
    if (params.order == nullptr && line < heads * params.rounds) count_line(params, line);
    return;
  }
  const int64_t row = warp * kRowsPerWarp + threadIdx.x % 32 / kRowLanes;
  const int64_t head = min(row, rows - 1) / params.rows, t = row - head * params.rows;
  const int64_t position = params.lengths[head / params.heads] + t;
  const bool kept = row < rows && has_room(position, params.capacity);
  const int head_dim = kept ? static_cast<int>(params.head_dim) : 0;
  RowShare<T> k, v;
  k.load(row_of<const T>(params.k, head, params.heads, t), head_dim);
  v.load(row_of<const T>(params.v, head, params.heads, t), head_dim);
  if (params.normalize) k.normalize(head_dim);
  const int64_t place = (head * params.capacity + position) * params.head_dim;
  k.store(static_cast<T*>(params.keys) + place, head_dim);
  if constexpr (kMixed) {
    const NextValues<T> next_values(params, head);
    if (kept) next_values.mix_with_next(v, t, head_dim);
    if (t == 0) next_values.complete_last(position);
  }
  v.store(static_cast<T*>(params.values) + place, head_dim);
}

// The new positions of a head and round in the order of their buckets.
struct SortedLine {
  const int32_t *order, *buckets;
  int64_t begin, rows, n_buckets, capacity;

  __device__ SortedLine(const LshCacheAppendParams& params, int64_t line)
      : order(params.order + line * params.rows),
        buckets(params.buckets + line * params.rows),
        begin(params.lengths[line / (params.heads * params.rounds)]),
        rows(params.rows),
        n_buckets(params.n_buckets),
        capacity(params.capacity) {}

  // -1: none, or no such place.
  __device__ __forceinline__ int32_t bucket(int64_t i) const {
    if (i < 0 || i >= rows) return -1;
    const int32_t t = order[i], bucket = buckets[t];
    return bucket < n_buckets && has_room(begin + t, capacity) ? max(bucket, -1) : -1;
  }
};

// A thread for each place of every line: `scratch` becomes, for each bucket that grows, the place
// of its first new position less the count before, so that position number i is at scratch + i.
__global__ __launch_bounds__(kAppendThreads) void find_buckets_kernel(
    const __grid_constant__ LshCacheAppendParams params) {
  const int64_t index = int64_t{blockIdx.x} * kAppendThreads + threadIdx.x;
  const int64_t line = index / params.rows, i = index % params.rows;
  if (line >= params.batch * params.heads * params.rounds) return;
  const SortedLine sorted(params, line);
  const int32_t bucket = sorted.bucket(i);
  if (bucket < 0 || bucket == sorted.bucket(i - 1)) return;
  const int64_t place = line * params.n_buckets + bucket;
  params.scratch[place] = static_cast<int32_t>(i) - max(params.counts[place], 0);
}

// The last W of each bucket go to their slots, the last one's number to the counts.
__global__ __launch_bounds__(kAppendThreads) void fill_buckets_kernel(
    const __grid_constant__ LshCacheAppendParams params) {
  const int64_t index = int64_t{blockIdx.x} * kAppendThreads + threadIdx.x;
  const int64_t line = index / params.rows, i = index % params.rows;
  if (line >= params.batch * params.heads * params.rounds) return;
  const SortedLine sorted(params, line);
  const int32_t bucket = sorted.bucket(i);
  if (bucket < 0 || bucket == sorted.bucket(i + params.window)) return;
  const int64_t place = line * params.n_buckets + bucket;
  const int32_t number = static_cast<int32_t>(i) - params.scratch[place];
  params.table[place * params.window + number % params.window] =
      static_cast<int32_t>(sorted.begin + sorted.order[i]);
  if (bucket != sorted.bucket(i + 1)) params.counts[place] = number + 1;
}

bool valid(const LshCacheAppendParams& params) {
  return params.batch >= 0 && params.heads >= 0 && params.rows >= 0 && params.rows <= INT32_MAX &&
         params.head_dim >= 8 && params.head_dim <= 256 && params.head_dim % 8 == 0 &&
         params.capacity >= 1 && params.rounds >= 1 && params.n_buckets >= 1 &&
         params.window >= 1 && (params.order == nullptr) == (params.scratch == nullptr) &&
         (params.value_mix == nullptr) == (params.last_values == nullptr);
}

template <typename T>
cudaError_t launch_append(const LshCacheAppendParams& params, cudaStream_t stream) {
  const bool counted = params.order == nullptr;
  const int64_t heads = params.batch * params.heads, lines = heads * params.rounds;
  const int64_t warps =
      ceil_div<int64_t>(heads * params.rows, kRowsPerWarp) + (counted ? lines : 0);
  const int64_t blocks = ceil_div<int64_t>(warps, kAppendThreads / 32);
  const int64_t sorted_blocks =
      counted ? 0 : ceil_div<int64_t>(lines * params.rows, kAppendThreads);
  if (std::max(blocks, sorted_blocks) > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel =
      params.value_mix != nullptr ? append_kernel<T, true> : append_kernel<T, false>;
  const cudaError_t error =
      launch_overlapped(kernel, {static_cast<unsigned>(blocks), kAppendThreads}, stream, params);
  if (error != cudaSuccess) return error;
  if (!counted) {
    const auto grid = static_cast<unsigned>(sorted_blocks);
    find_buckets_kernel<<<grid, kAppendThreads, 0, stream>>>(params);
    fill_buckets_kernel<<<grid, kAppendThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t lsh_cache_append(const LshCacheAppendParams& params, cudaStream_t stream) {
  if (!valid(params)) return cudaErrorInvalidValue;
  if (params.batch * params.heads * params.rows == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype,
                        [&](auto x) { return launch_append<decltype(x)>(params, stream); });
}

}  // namespace reformer::kernels

// chunked_attention on the CPU. The line of chunks is cut into blocks of chunks of one round; a
// block gathers its rows once and multiplies them tile by tile, so memory does not grow with rounds
// or windows.
//
// Results have the same bits for any number of threads: whatever adds to the same row does so in a
// fixed order. Forward: rounds follow each other, and in a round every query is in one block.
// Backward: blocks that write the keys of a common chunk are in different phases.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "chunked_attention_common.h"
#include "kernels/common/dropout.h"
#include "lanes.h"

namespace reformer {
namespace {

constexpr double kNormEps = 1e-12;  // torch.nn.functional.normalize's
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kBlockRows = 512;
constexpr int64_t kTileElements = 4096;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Chunks first ... first + count - 1 of the line, all of one round.
struct Block {
  int64_t first, count;
};

// All rounds' chunks, laid end to end. Windows are sets of chunks: none is wider than the line.
struct Line {
  int64_t length, rounds, chunk, per_round, total, back, ahead;
  bool wrap;

  explicit Line(const ChunkedAttentionArgs& args)
      : length(args.length()),
        rounds(args.rounds()),
        chunk(std::min(args.chunk_size, length)),
        per_round(divide_up(length, chunk)),
        total(rounds * per_round),
        wrap(*args.wrap) {
    const int64_t others = (wrap ? total : per_round) - 1;
    back = std::min(args.look_back, others);
    ahead = std::min(args.look_ahead, wrap ? others - back : others);
  }

  int64_t window() const { return back + 1 + ahead; }
  int64_t round_of(int64_t c) const { return c / per_round; }
  int64_t rows_of(int64_t c) const { return std::min(chunk, length - c % per_round * chunk); }
  // Enough chunks that two blocks with one between them share no key.
  int64_t block_chunks() const { return std::max({kBlockRows / chunk, back + ahead, int64_t{1}}); }
  // The chunk at an index that may lie beyond the line or the round; -1: there is none.
  int64_t resolve(int64_t c, int64_t round) const {
    if (wrap) return (c % total + total) % total;
    return c >= 0 && c / per_round == round ? c : -1;
  }
  std::vector<Block> blocks_of(int64_t round) const {
    std::vector<Block> blocks;
    const int64_t end = (round + 1) * per_round, step = block_chunks();
    for (int64_t c = round * per_round; c < end; c += step) {
      blocks.push_back({c, std::min(step, end - c)});
    }
    return blocks;
  }
};

// Blocks of one phase may run at once, phases follow each other.
using Phases = std::vector<std::vector<Block>>;

Phases forward_phases(const Line& line) {
  Phases phases;
  for (int64_t round = 0; round < line.rounds; ++round) phases.push_back(line.blocks_of(round));
  return phases;
}

// In a round: every other block, the rest, and one by one those that see another round, whose
// chunks may hold any position.
Phases backward_phases(const Line& line) {
  Phases phases;
  for (int64_t round = 0; round < line.rounds; ++round) {
    std::vector<Block> alternate[2], alone;
    bool odd = false;
    for (const Block& block : line.blocks_of(round)) {
      const bool inside = block.first - line.back >= round * line.per_round &&
                          block.first + block.count + line.ahead <= (round + 1) * line.per_round;
      (inside || !line.wrap ? alternate[odd] : alone).push_back(block);
      odd = !odd;
    }
    phases.push_back(alternate[0]);
    phases.push_back(alternate[1]);
    for (const Block& block : alone) phases.push_back({block});
  }
  return phases;
}

// worker_factory() -> worker; worker(head, block), where head counts through the batch.
template <typename Factory>
void for_each_block(int64_t heads, const Phases& phases, const Factory& worker_factory) {
  const int64_t threads = at::get_num_threads();
  if (heads % threads == 0 || heads >= 4 * threads) {  // no barriers
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      auto worker = worker_factory();
      for (int64_t head = begin; head < end; ++head) {
        for (const auto& phase : phases) {
          for (const Block& block : phase) worker(head, block);
        }
      }
    });
    return;
  }
  for (const auto& phase : phases) {
    const auto blocks = static_cast<int64_t>(phase.size());
    at::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
      auto worker = worker_factory();
      for (int64_t task = begin; task < end; ++task) worker(task / blocks, phase[task % blocks]);
    });
  }
}

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

// Where i's window of some round lies, and the chunk of each key in a round that it touches.
template <typename T>
struct Meeting {
  Integer<T> window_start;
  Integer<T> bucket;             // of i in that round
  const Integer<T>* key_chunk;   // [columns]
  const Integer<T>* key_bucket;  // [columns] or null
};

// One query of a tile.
template <typename T>
struct Query {
  Integer<T> position, bucket;
  uint32_t dropout_key;
  const Meeting<T>* meetings;
  int64_t n_meetings;
};

// The keys of a tile, and which pairs are valid. Arrays are padded to whole vectors by no keys.
template <typename T>
struct Keys {
  int64_t columns;
  const Integer<T>* position;  // -1: no key
  const Integer<T>* bucket;    // null: pairs of different buckets may attend
  const T* factor;             // of the logits: scale, over |q_j| for shared QK
  T shrink;                    // of gradients: what rows are gathered with, see Problem
  bool causal, mask_self, correct_duplicates, dropout;
  Integer<T> window_span, line_period;  // of meetings
  typename Lanes<T>::Word dropout_threshold;
  T dropout_scale;
};

template <typename T>
REFORMER_INLINE IntegerVector<T> valid_pairs(const Keys<T>& keys, const Query<T>& query,
                                             int64_t j) {
  using Word = typename Lanes<T>::Word;
  const IntegerVector<T> position = load_integers<T>(keys.position + j);
  // As words, no key (-1) is beyond every limit.
  const Integer<T> limit = keys.causal ? query.position : std::numeric_limits<Integer<T>>::max();
  const Integer<T> self = keys.mask_self ? query.position : -1;
  IntegerVector<T> valid =
      ((WordVector<T>)position <= static_cast<Word>(limit)) & (position != self);
  if (keys.bucket != nullptr) valid &= load_integers<T>(keys.bucket + j) == query.bucket;
  return valid;
}

// In how many slots of all rounds the query meets each key; at least 1.
template <typename T>
REFORMER_INLINE Vector<T> multiplicity(const Keys<T>& keys, const Query<T>& query, int64_t j) {
  using Word = typename Lanes<T>::Word;
  IntegerVector<T> count{};
  for (int64_t m = 0; m < query.n_meetings; ++m) {
    const Meeting<T>& meeting = query.meetings[m];
    IntegerVector<T> distance = load_integers<T>(meeting.key_chunk + j) - meeting.window_start;
    distance += (distance < 0) & keys.line_period;
    IntegerVector<T> meets = (WordVector<T>)distance <= static_cast<Word>(keys.window_span);
    if (meeting.key_bucket != nullptr) {
      meets &= load_integers<T>(meeting.key_bucket + j) == meeting.bucket;
    }
    count -= meets;
  }
  count = count < 1 ? IntegerVector<T>{} + 1 : count;
  return __builtin_convertvector(count, Vector<T>);
}

// csrc/kernels/common/dropout.h on lanes of 32 or 64 bits that hold 32-bit words.
template <typename T>
REFORMER_INLINE WordVector<T> mix32_lanes(WordVector<T> x) {
  constexpr typename Lanes<T>::Word low = 0xffffffffU;
  x ^= x >> 16;
  x = (x * 0x7feb352dU) & low;
  x ^= x >> 15;
  x = (x * 0x846ca68bU) & low;
  x ^= x >> 16;
  return x;
}

// 1 / (1 - p) where dropout keeps the pair, else 0.
template <typename T>
REFORMER_INLINE Vector<T> dropout_factor(const Keys<T>& keys, const Query<T>& query, int64_t j) {
  using Word = typename Lanes<T>::Word;
  constexpr Word low = 0xffffffffU;
  const WordVector<T> position = (WordVector<T>)load_integers<T>(keys.position + j);
  const WordVector<T> word = ((mix32_lanes<T>((position * 0x9e3779b9U) & low) | 1) *
                              static_cast<Word>(query.dropout_key)) &
                             low;
  return word >= keys.dropout_threshold ? Vector<T>{} + keys.dropout_scale : Vector<T>{};
}

// scores [columns] -> exp(logit - peak) / multiplicity in place; the peak and the sum (before
// dropout).
template <typename T>
REFORMER_INLINE void exponentiate_row(const Keys<T>& keys, const Query<T>& query, T* scores,
                                      T& peak, T& total) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  constexpr int64_t lanes = Lanes<T>::kSize;
  Vector<T> highest = Vector<T>{} - infinity;
  for (int64_t j = 0; j < keys.columns; j += lanes) {
    Vector<T> logit = load(scores + j) * load(keys.factor + j);
    logit = valid_pairs(keys, query, j) ? logit : Vector<T>{} - infinity;
    highest = logit > highest ? logit : highest;
    store(scores + j, logit);
  }
  peak = max<T>(highest);
  const T shift = peak == -infinity ? T(0) : peak;
  Vector<T> sums{};
  for (int64_t j = 0; j < keys.columns; j += lanes) {
    Vector<T> weight = exp<T>(load(scores + j) - shift);
    if (keys.correct_duplicates) weight /= multiplicity(keys, query, j);
    sums += weight;
    if (keys.dropout) weight *= dropout_factor(keys, query, j);
    store(scores + j, weight);
  }
  total = sum<T>(sums);
}

// scores [columns] -> weights after dropout; grads (of the weights) -> of the scores. Both in
// place.
template <typename T>
REFORMER_INLINE void differentiate_row(const Keys<T>& keys, const Query<T>& query, T lse, T delta,
                                       T* scores, T* grads) {
  for (int64_t j = 0; j < keys.columns; j += Lanes<T>::kSize) {
    const Vector<T> factor = load(keys.factor + j);
    const IntegerVector<T> valid = valid_pairs(keys, query, j);
    Vector<T> weight = exp<T>(load(scores + j) * factor - lse);
    Vector<T> grad = load(grads + j);
    if (keys.correct_duplicates) weight /= multiplicity(keys, query, j);
    weight = weight > T(1) ? Vector<T>{} + T(1) : weight;  // large logits and lse are rounded
    Vector<T> kept = weight;
    if (keys.dropout) {
      const Vector<T> keep = dropout_factor(keys, query, j);
      kept *= keep;
      grad *= keep;
    }
    grad = weight * (grad - delta) * (factor * keys.shrink);
    store(scores + j, valid ? kept : Vector<T>{});
    store(grads + j, valid ? grad : Vector<T>{});
  }
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

// What both passes read, in the computing type.
template <typename T>
struct Problem {
  Line line;
  int64_t batch, heads, length, head_dim;
  int64_t
      width;  // of gathered rows: zeros after head_dim, and a stride that spreads over the cache
  bool shared_qk, causal, mask_self, correct_duplicates;
  T scale;
  Rows q, k, v;
  Rows own;  // own_values, or v
  at::Tensor order, buckets, padding;
  Buffer<T> inverse_norm;  // [B, H, L], shared QK: 1 / |q| of rows times the head's shrink
  // [B, H], shared QK: 1, but for heads with queries so long that their products would overflow a
  // power of two that makes them short enough. Keys do not change with it, nor do the gradients
  // that go through them; logits are divided by it.
  std::vector<T> shrink;
  Buffer<int32_t> chunk_of;  // [B, H, R, L]: where each position sits; correct_duplicates
  uint32_t dropout_threshold = 0;
  double dropout_p;
  uint64_t dropout_seed = 0;

  explicit Problem(const ChunkedAttentionArgs& args);

  const int32_t* order_of(int64_t head, int64_t round) const {
    if (!order.defined()) return nullptr;
    return order.const_data_ptr<int32_t>() + (head * line.rounds + round) * length;
  }
  const int32_t* buckets_of(int64_t head, int64_t round) const {
    if (!buckets.defined()) return nullptr;
    return buckets.const_data_ptr<int32_t>() + (head * line.rounds + round) * length;
  }
  const int32_t* chunks_of(int64_t head, int64_t round) const {
    return chunk_of.get() + (head * line.rounds + round) * length;
  }
  // The inverse norm of rows shorter than kNormEps, whose keys are not of length one.
  T clamped_inverse(int64_t head) const { return T(1) / (static_cast<T>(kNormEps) * shrink[head]); }
  bool is_padding(int64_t head, int64_t position) const {
    return padding.defined() && padding.const_data_ptr<bool>()[head / heads * length + position];
  }
};

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

// Raises unless every round of order holds every position once; fills chunks, if asked for.
void check_order(const Line& line, const int32_t* order, int64_t round, int32_t* chunks) {
  std::vector<bool> seen(line.length);
  for (int64_t i = 0; i < line.length; ++i) {
    const int64_t position = order[i];
    REFORMER_CHECK(position >= 0 && position < line.length,
                   "chunked_attention: expected order with positions in [0, ", line.length,
                   "), got ", position);
    REFORMER_CHECK(!seen[position],
                   "chunked_attention: expected order to hold every position once per round, got ",
                   position, " twice");
    seen[position] = true;
    if (chunks) {
      chunks[position] = static_cast<int32_t>(round * line.per_round + i / line.chunk);
    }
  }
}

template <typename T>
Problem<T>::Problem(const ChunkedAttentionArgs& args)
    : line(args),
      batch(args.batch()),
      heads(args.heads()),
      length(args.length()),
      head_dim(args.head_dim()),
      width(pad_to_lanes<T>(head_dim) + Lanes<T>::kSize),
      shared_qk(args.shared_qk()),
      causal(args.causal),
      mask_self(*args.mask_self),
      correct_duplicates(args.correct_duplicates),
      scale(static_cast<T>(args.resolved_scale())),
      q(args.q),
      v(args.v),
      own(args.own_values.value_or(args.v)),
      dropout_p(args.dropout_p) {
  if (!shared_qk) k = Rows(*args.k);
  if (args.order) order = args.order->contiguous();
  if (args.buckets) buckets = args.buckets->contiguous();
  if (args.key_padding_mask) padding = args.key_padding_mask->contiguous();
  if (dropout_p > 0.0) {
    dropout_threshold = reformer::dropout_threshold(dropout_p);
    dropout_seed = static_cast<uint64_t>(*args.dropout_seed->template const_data_ptr<int64_t>());
  }
  const int64_t rounds = batch * heads * line.rounds;
  if (correct_duplicates) chunk_of = Buffer<int32_t>(rounds * length);
  if (order.defined() || correct_duplicates) {
    at::parallel_for(0, rounds, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> natural(order.defined() ? 0 : length);
      for (size_t i = 0; i < natural.size(); ++i) natural[i] = static_cast<int32_t>(i);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / line.rounds, round = i % line.rounds;
        check_order(line, order.defined() ? order_of(head, round) : natural.data(), round,
                    correct_duplicates ? chunk_of.get() + i * length : nullptr);
      }
    });
  }
  if (shared_qk) {
    inverse_norm = Buffer<T>(batch * heads * length);
    shrink.assign(batch * heads, T(1));
    constexpr T large = std::numeric_limits<T>::max() / 256;  // of the square of a norm
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        T* inverse = inverse_norm.get() + head * length;
        visit_head<T>(q, head, [&](const auto* rows) {
          if (inverse_norms(rows, q.stride(), length, head_dim, inverse) > large) {
            shrink[head] = shrunk_inverse_norms(rows, q.stride(), length, head_dim, inverse);
          }
          for (int64_t i = 0; padding.defined() && i < length; ++i) {  // a row of zeros: see read
            if (is_padding(head, i) && !is_finite<T>(rows + i * q.stride(), head_dim)) {
              inverse[i] = clamped_inverse(head);
            }
          }
        });
      }
    });
  }
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

// The gathered rows of a block's queries and keys, and its tiles.
template <typename T>
class Gathered {
 public:
  explicit Gathered(const Problem<T>& problem)
      : p(problem),
        line(problem.line),
        max_rows((line.block_chunks() + line.window() - 1) * line.chunk),
        columns(pad_to_lanes<T>(line.window() * line.chunk)),
        // An odd number of vectors: columns of a tile spread over the sets of the cache.
        key_stride(((pad_to_lanes<T>(max_rows) / Lanes<T>::kSize + 1) | 1) * Lanes<T>::kSize),
        tile_rows(std::clamp<int64_t>(kTileElements / columns, 12, 60)),
        position_(key_stride),
        key_position_(key_stride),
        bucket_(key_stride),
        factor_(key_stride),
        all_chunks_(p.correct_duplicates ? line.rounds * key_stride : 0),
        all_buckets_(p.correct_duplicates && p.buckets.defined() ? line.rounds * key_stride : 0),
        tile_integers_((2 + 2 * line.rounds) * columns),
        tile_factor_(columns),
        keys_(key_stride * p.width),
        queries_(p.shared_qk ? 0 : key_stride * p.width) {}

  // Reads what the block's queries and keys are. Query row i is row back * chunk + i of the keys.
  void read(int64_t head_index, const Block& b) {
    head = head_index;
    block = b;
    round = line.round_of(b.first);
    rows = (b.count + line.window() - 1) * line.chunk;
    std::fill_n(position_.get(), key_stride, -1);
    for (int64_t slot = 0; slot < b.count + line.window() - 1; ++slot) {
      const int64_t c = line.resolve(b.first - line.back + slot, round);
      if (c >= 0) read_chunk(c, slot * line.chunk);
    }
    for (int64_t i = 0; i < key_stride; ++i) {
      const auto at = position_.get()[i];
      key_position_.get()[i] = at < 0 || p.is_padding(head, at) ? -1 : at;
      factor_.get()[i] = at < 0 || !p.shared_qk ? p.scale : shared_factor(at);
    }
    if (p.correct_duplicates) read_all_rounds();
    gather(p.shared_qk ? p.q : p.k, head, p.head_dim, position_.get(), padded_rows(), keys_.get(),
           p.width);
    if (p.padding.defined()) clear_padding();
    if (p.shared_qk && p.shrink[head] != T(1)) {
      for (int64_t i = 0; i < padded_rows() * p.width; ++i) keys_.get()[i] *= p.shrink[head];
    }
    if (!p.shared_qk) {
      gather(p.q, head, p.head_dim, query_positions(), b.count * line.chunk, queries_.get(),
             p.width);
    }
  }

  // Makes zeros of the rows of silent queries (by position): they may be anything, and are
  // multiplied by zeros.
  void clear_queries(const uint8_t* silent, T* rows) const {
    for (int64_t i = 0; i < block.count * line.chunk; ++i) {
      const auto at = query_positions()[i];
      if (at >= 0 && silent[at]) std::fill_n(rows + i * p.width, p.width, T(0));
    }
  }

  // The keys' values; those of no key are zero, whatever padding holds.
  void gather_values(T* rows_out) const {
    gather(p.v, head, p.head_dim, key_position_.get(), padded_rows(), rows_out, p.width);
  }

  int64_t padded_rows() const { return pad_to_lanes<T>(rows); }
  const Integer<T>* positions() const { return position_.get(); }
  const Integer<T>* query_positions() const { return position_.get() + line.back * line.chunk; }
  const T* keys() const { return keys_.get(); }
  T* separate_queries() const { return queries_.get(); }
  const T* queries() const {
    return p.shared_qk ? keys_.get() + line.back * line.chunk * p.width : queries_.get();
  }

  // A tile is the queries begin ... begin + n - 1 of the block (of one chunk) and the keys of their
  // window, rows `first_key` ... of the block, without those at its ends that no query may see.
  struct Tile {
    int64_t begin, n, first_key, n_keys;
    Keys<T> keys;
  };

  template <typename F>
  void for_each_tile(const F& f) {
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t n = line.rows_of(block.first + i);
      for (int64_t from = 0; from < n; from += tile_rows) {
        f(tile(i, i * line.chunk + from, std::min(tile_rows, n - from)));
      }
    }
  }

  // Query i of the block, as the tile's row passes want it.
  REFORMER_INLINE Query<T> query(int64_t i) {
    Query<T> result;
    result.position = query_positions()[i];
    result.bucket = bucket_.get()[line.back * line.chunk + i];
    result.dropout_key =
        p.dropout_p > 0.0
            ? dropout_row_key(p.dropout_seed, static_cast<uint32_t>(head),
                              static_cast<uint32_t>(round), static_cast<uint32_t>(result.position))
            : 0;
    if (p.correct_duplicates) find_meetings(result.position);
    result.meetings = meetings_.data();
    result.n_meetings = static_cast<int64_t>(meetings_.size());
    return result;
  }

  const Problem<T>& p;
  const Line& line;
  const int64_t max_rows, columns, key_stride, tile_rows;
  int64_t head = 0, round = 0, rows = 0;
  Block block{0, 0};

 private:
  // scale / |q|, of a row that is gathered shrunk.
  T shared_factor(int64_t position) const {
    const T factor = p.scale * p.inverse_norm.get()[head * p.length + position] / p.shrink[head];
    const T largest = std::numeric_limits<T>::max();
    return factor > largest ? largest : factor;  // of a row of zeros among very long ones
  }

  // Keys that are padding and not finite become zeros: their weights are zero, and 0 * NaN is NaN.
  void clear_padding() {
    for (int64_t i = 0; i < padded_rows(); ++i) {
      T* row = keys_.get() + i * p.width;
      const bool padding = position_.get()[i] >= 0 && key_position_.get()[i] < 0;
      if (padding && !is_finite<T>(row, p.head_dim)) std::fill_n(row, p.width, T(0));
    }
  }

  void read_chunk(int64_t c, int64_t row) {
    const int64_t chunk_round = line.round_of(c), first = c % line.per_round * line.chunk;
    const int32_t* order = p.order_of(head, chunk_round);
    const int32_t* buckets = p.buckets_of(head, chunk_round);
    for (int64_t i = 0; i < line.rows_of(c); ++i) {
      const int64_t position = order ? order[first + i] : first + i;
      position_.get()[row + i] = static_cast<Integer<T>>(position);
      // A chunk of another round has no pair of the same bucket.
      if (buckets) {
        bucket_.get()[row + i] =
            chunk_round == round ? buckets[position] : std::numeric_limits<int32_t>::min();
      }
    }
  }

  // The chunk (and bucket) of every key in every round.
  void read_all_rounds() {
    for (int64_t r = 0; r < line.rounds; ++r) {
      const int32_t* chunks = p.chunks_of(head, r);
      const int32_t* buckets = p.buckets_of(head, r);
      for (int64_t i = 0; i < key_stride; ++i) {
        const auto position = position_.get()[i];
        all_chunks_.get()[r * key_stride + i] = position < 0 ? -1 : chunks[position];
        if (buckets) {
          all_buckets_.get()[r * key_stride + i] = position < 0 ? -1 : buckets[position];
        }
      }
    }
  }

  Tile tile(int64_t chunk, int64_t begin, int64_t n) {
    Tile t;
    t.begin = begin;
    t.n = n;
    int64_t first = chunk * line.chunk, end = first + line.window() * line.chunk;
    Integer<T> limit = std::numeric_limits<Integer<T>>::max();
    if (p.causal) {
      limit = *std::max_element(query_positions() + begin, query_positions() + begin + n);
    }
    const auto unseen = [&](int64_t i) {
      return key_position_.get()[i] < 0 || key_position_.get()[i] > limit;
    };
    while (first < end && unseen(end - 1)) --end;
    while (first < end && unseen(first)) ++first;
    t.first_key = first;
    t.n_keys = end - first;

    Keys<T>& keys = t.keys;
    keys.columns = pad_to_lanes<T>(t.n_keys);
    keys.shrink = p.shared_qk ? p.shrink[head] : T(1);
    keys.causal = p.causal;
    keys.mask_self = p.mask_self;
    keys.correct_duplicates = p.correct_duplicates;
    keys.dropout = p.dropout_p > 0.0;
    keys.window_span = static_cast<Integer<T>>(line.window() - 1);
    keys.line_period = static_cast<Integer<T>>(line.wrap ? line.total : 0);
    keys.dropout_threshold = p.dropout_threshold;
    keys.dropout_scale = static_cast<T>(1.0 / (1.0 - p.dropout_p));
    int64_t used = 0;
    const auto pad = [&](const Integer<T>* from, Integer<T> filler) {
      Integer<T>* to = tile_integers_.get() + used++ * columns;
      std::copy_n(from + first, t.n_keys, to);
      std::fill(to + t.n_keys, to + keys.columns, filler);
      return to;
    };
    keys.position = pad(key_position_.get(), -1);
    keys.bucket = p.buckets.defined() ? pad(bucket_.get(), -1) : nullptr;
    std::copy_n(factor_.get() + first, t.n_keys, tile_factor_.get());
    std::fill(tile_factor_.get() + t.n_keys, tile_factor_.get() + keys.columns, T(0));
    keys.factor = tile_factor_.get();
    tile_chunks_.clear();
    tile_buckets_.clear();
    if (p.correct_duplicates) {
      for (int64_t r = 0; r < line.rounds; ++r) {
        tile_chunks_.push_back(pad(all_chunks_.get() + r * key_stride, -1));
        tile_buckets_.push_back(p.buckets.defined() ? pad(all_buckets_.get() + r * key_stride, -1)
                                                    : nullptr);
      }
    }
    return t;
  }

  // All pairs of a round of the query and a round of keys that its window there touches.
  void find_meetings(Integer<T> position) {
    meetings_.clear();
    for (int64_t r = 0; r < line.rounds; ++r) {
      const int64_t start = p.chunks_of(head, r)[position] - line.back;
      int64_t first = r, last = r;
      if (line.wrap && !p.buckets.defined()) {
        first = (start + line.total) / line.per_round;
        last = std::min((start + line.total + line.window() - 1) / line.per_round,
                        first + line.rounds - 1);
      }
      for (int64_t touched = first; touched <= last; ++touched) {
        const int64_t key_round = touched % line.rounds;
        meetings_.push_back(
            {static_cast<Integer<T>>(line.wrap ? (start + line.total) % line.total : start),
             p.buckets.defined() ? p.buckets_of(head, r)[position] : 0, tile_chunks_[key_round],
             tile_buckets_[key_round]});
      }
    }
  }

  Buffer<Integer<T>> position_, key_position_, bucket_;
  Buffer<T> factor_;
  Buffer<Integer<T>> all_chunks_, all_buckets_;
  Buffer<Integer<T>> tile_integers_;
  Buffer<T> tile_factor_, keys_, queries_;
  std::vector<const Integer<T>*> tile_chunks_, tile_buckets_;
  std::vector<Meeting<T>> meetings_;
};

// Forward
// ------------------------------------------------------------------------------------------

// A head's results: out and lse hold the running numerator and peak until the last round.
template <typename T>
struct Accumulators {
  T* out;
  int64_t out_stride;
  T* peak;
  T* total;
  bool first_round, last_round;
};

// Joins a round's rows to those of the rounds before.
template <typename T>
REFORMER_INLINE void join_row(const Accumulators<T>& into, int64_t position, const T* row, T peak,
                              T total, int64_t head_dim) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T* out = into.out + position * into.out_stride;
  const T old_peak = into.first_round ? -infinity : into.peak[position];
  const T old_total = into.first_round ? T(0) : into.total[position];
  const T new_peak = std::max(old_peak, peak);
  const T shift = new_peak == -infinity ? T(0) : new_peak;
  T new_share = std::exp(peak - shift), old_share = std::exp(old_peak - shift);
  const T new_total = total * new_share + old_total * old_share;
  into.total[position] = new_total;
  into.peak[position] = new_peak;
  if (into.last_round && new_total != 0) {
    into.peak[position] = stored_lse(new_peak + std::log(new_total));
    new_share /= new_total;
    old_share /= new_total;
  }
  if (into.first_round) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = row[d] * new_share;
  } else {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = row[d] * new_share + out[d] * old_share;
  }
}

// What one thread needs for the blocks it works on.
template <typename T>
struct ForwardScratch {
  Gathered<T> block;
  Buffer<T> keys_t;         // [head_dim, key_stride]
  Buffer<T> values;         // [key_stride, width]
  Buffer<T> scores;         // [tile_rows, columns]
  Buffer<T> rows;           // [tile_rows, width]
  Buffer<T> peaks, totals;  // [tile_rows]

  explicit ForwardScratch(const Problem<T>& p)
      : block(p),
        keys_t(p.head_dim * block.key_stride),
        values(block.key_stride * p.width),
        scores(block.tile_rows * block.columns),
        rows(block.tile_rows * p.width),
        peaks(block.tile_rows),
        totals(block.tile_rows) {}
};

template <typename T>
REFORMER_CLONES void attend(ForwardScratch<T>& scratch, const typename Gathered<T>::Tile& tile,
                            const Accumulators<T>& into) {
  Gathered<T>& block = scratch.block;
  const Problem<T>& p = block.p;
  const int64_t width = p.width, columns = block.columns;
  T *scores = scratch.scores.get(), *rows = scratch.rows.get();
  T *peaks = scratch.peaks.get(), *totals = scratch.totals.get();
  multiply(block.queries() + tile.begin * width, width, 1, scratch.keys_t.get() + tile.first_key,
           block.key_stride, scores, columns, tile.n, tile.keys.columns, p.head_dim, false);
  for (int64_t i = 0; i < tile.n; ++i) {
    exponentiate_row(tile.keys, block.query(tile.begin + i), scores + i * columns, peaks[i],
                     totals[i]);
  }
  multiply(scores, columns, 1, scratch.values.get() + tile.first_key * width, width, rows, width,
           tile.n, pad_to_lanes<T>(p.head_dim), tile.n_keys, false);
  const Integer<T>* positions = block.query_positions() + tile.begin;
  for (int64_t i = 0; i < tile.n; ++i) {
    join_row(into, positions[i], rows + i * width, peaks[i], totals[i], p.head_dim);
  }
}

template <typename T>
void forward(const ChunkedAttentionArgs& args, const at::Tensor& out, const at::Tensor& lse) {
  const Problem<T> p(args);
  const Rows out_rows(out);
  T* lse_data = lse.template mutable_data_ptr<T>();
  const Buffer<T> total(lse.numel());

  for_each_block(p.batch * p.heads, forward_phases(p.line), [&] {
    return [&, scratch = ForwardScratch<T>(p)](int64_t head, const Block& b) mutable {
      Gathered<T>& block = scratch.block;
      block.read(head, b);
      block.gather_values(scratch.values.get());
      transpose(block.keys(), p.width, block.padded_rows(), p.head_dim, scratch.keys_t.get(),
                block.key_stride);
      const Accumulators<T> into{out_rows.head<T>(head),     out_rows.stride(),
                                 lse_data + head * p.length, total.get() + head * p.length,
                                 block.round == 0,           block.round == p.line.rounds - 1};
      block.for_each_tile(
          [&](const typename Gathered<T>::Tile& tile) { attend(scratch, tile, into); });
    };
  });

  // Queries without a key: themselves, or nothing.
  at::parallel_for(0, lse.numel(), 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (total.get()[i] != 0) continue;
      const int64_t head = i / p.length, position = i % p.length;
      T* row = out_rows.head<T>(head) + position * out_rows.stride();
      if (p.mask_self && !p.is_padding(head, position)) {
        visit_head<T>(p.own, head, [&](const auto* values) {
          convert_row(values + position * p.own.stride(), p.head_dim, row);
        });
        lse_data[i] = static_cast<T>(kSelfOnlyLse);
      } else {
        std::fill_n(row, p.head_dim, T(0));
        lse_data[i] = -std::numeric_limits<T>::infinity();
      }
    }
  });
}

// A tensor to compute into: x itself, or a wider one like it.
at::Tensor computing(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16
             ? at::empty_like(x, x.options().dtype(at::kFloat))
             : x;
}

void finish(const at::Tensor& x, const at::Tensor& computed) {
  if (!x.is_same(computed)) x.copy_(computed);
}

std::tuple<at::Tensor, at::Tensor> chunked_attention_cpu(const ChunkedAttentionArgs& args) {
  const at::Tensor out = chunked_attention_output(args.q), lse = chunked_attention_lse(args.q);
  if (out.numel() == 0) return {out, lse};
  const at::Tensor computed = computing(out);
  if (lse.scalar_type() == at::kDouble) {
    forward<double>(args, computed, lse);
  } else {
    forward<float>(args, computed, lse);
  }
  finish(out, computed);
  return {out, lse};
}

// Backward
// -----------------------------------------------------------------------------------------

// delta_i = dout_i . out_i - dlse_i, whether both cotangents are zero (then the query contributes
// nothing to any gradient, whatever it is), and, if that is asked for, the value's gradient of a
// query that saw only itself.
template <typename T, typename S>
REFORMER_CLONES void begin_gradients(const S* out, int64_t out_stride, const S* grad_out,
                                     int64_t grad_stride, int64_t n, int64_t head_dim, bool pass_on,
                                     const T* lse, const T* grad_lse, T* delta, uint8_t* silent,
                                     T* grad_v, int64_t grad_v_stride) {
  T out_scratch[kMaxHeadDim], grad_scratch[kMaxHeadDim];
  for (int64_t i = 0; i < n; ++i) {
    const T* grad = computing_row(grad_out + i * grad_stride, head_dim, grad_scratch);
    delta[i] = dot(grad, computing_row(out + i * out_stride, head_dim, out_scratch), head_dim);
    if (grad_lse) delta[i] -= grad_lse[i];
    bool any = grad_lse && grad_lse[i] != T(0);
    for (int64_t d = 0; d < head_dim; ++d) any |= grad[d] != T(0);
    silent[i] = !any;
    if (pass_on && lse[i] == static_cast<T>(kSelfOnlyLse)) {
      std::copy_n(grad, head_dim, grad_v + i * grad_v_stride);
    }
  }
}

// Gradients of unit-length keys, over |q_j| -> those of q_j: the part along the key vanishes.
template <typename T>
REFORMER_CLONES void project(const T* keys, int64_t width, const Integer<T>* positions, int64_t n,
                             const T* inverse_norm, T clamped, int64_t head_dim, T* grads) {
  for (int64_t i = 0; i < n; ++i) {
    if (positions[i] < 0) continue;
    const T inverse = inverse_norm[positions[i]];
    if (inverse == clamped) continue;  // a clamped norm is a constant
    const T* key = keys + i * width;
    T* grad = grads + i * width;
    const T along = dot(grad, key, head_dim) * inverse * inverse;
    for (int64_t d = 0; d < head_dim; ++d) grad[d] -= along * key[d];
  }
}

// What one thread needs for the blocks it works on.
template <typename T>
struct BackwardScratch {
  Gathered<T> block;
  Buffer<T> keys_t, values_t;        // [head_dim, key_stride]
  Buffer<T> grad_out;                // [key_stride, width], of the block's queries
  Buffer<T> scores, grad_scores;     // [tile_rows, columns]
  Buffer<T> grad_queries;            // [tile_rows, width]
  Buffer<T> grad_keys, grad_values;  // [key_stride, width]

  explicit BackwardScratch(const Problem<T>& p)
      : block(p),
        keys_t(p.head_dim * block.key_stride),
        values_t(p.head_dim * block.key_stride),
        grad_out(block.key_stride * p.width),
        scores(block.tile_rows * block.columns),
        grad_scores(block.tile_rows * block.columns),
        grad_queries(block.tile_rows * p.width),
        grad_keys(block.key_stride * p.width),
        grad_values(block.key_stride * p.width) {}
};

// Recomputes a tile's weights from lse; writes the queries' gradients, adds to those of keys and
// values.
template <typename T>
REFORMER_CLONES void differentiate(BackwardScratch<T>& scratch,
                                   const typename Gathered<T>::Tile& tile, const T* lse,
                                   const T* delta, const uint8_t* silent) {
  Gathered<T>& block = scratch.block;
  const Problem<T>& p = block.p;
  const int64_t width = p.width, columns = block.columns, depth = pad_to_lanes<T>(p.head_dim);
  const T* queries = block.queries() + tile.begin * width;
  const T* grad_out = scratch.grad_out.get() + tile.begin * width;
  T *scores = scratch.scores.get(), *grads = scratch.grad_scores.get();
  multiply(queries, width, 1, scratch.keys_t.get() + tile.first_key, block.key_stride, scores,
           columns, tile.n, tile.keys.columns, p.head_dim, false);
  multiply(grad_out, width, 1, scratch.values_t.get() + tile.first_key, block.key_stride, grads,
           columns, tile.n, tile.keys.columns, p.head_dim, false);
  for (int64_t i = 0; i < tile.n; ++i) {
    const Query<T> query = block.query(tile.begin + i);
    if (silent[query.position]) {
      std::fill_n(scores + i * columns, tile.keys.columns, T(0));
      std::fill_n(grads + i * columns, tile.keys.columns, T(0));
      continue;
    }
    differentiate_row(tile.keys, query, lse[query.position], delta[query.position],
                      scores + i * columns, grads + i * columns);
  }
  multiply(grads, columns, 1, block.keys() + tile.first_key * width, width,
           scratch.grad_queries.get(), width, tile.n, depth, tile.n_keys, false);
  multiply(grads, 1, columns, queries, width, scratch.grad_keys.get() + tile.first_key * width,
           width, tile.n_keys, depth, tile.n, true);
  multiply(scores, 1, columns, grad_out, width, scratch.grad_values.get() + tile.first_key * width,
           width, tile.n_keys, depth, tile.n, true);
}

template <typename T>
void backward(const ChunkedAttentionArgs& args, const ChunkedAttentionResults& results,
              const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  const Problem<T> p(args);
  const int64_t heads = p.batch * p.heads;
  const Rows out(results.out), grad_out(results.grad_out);
  const Rows grad_q_rows(grad_q), grad_v_rows(grad_v);
  const Rows grad_k_rows = p.shared_qk ? Rows() : Rows(grad_k);
  const at::Tensor lse = results.lse.contiguous();
  const at::Tensor grad_lse = results.grad_lse ? results.grad_lse->contiguous() : at::Tensor();
  const T* lse_data = lse.template const_data_ptr<T>();
  const Buffer<T> delta(lse.numel());
  const Buffer<uint8_t> silent(lse.numel());
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const auto clear = [&](const Rows& rows) {
        for (int64_t i = 0; i < p.length; ++i) {
          std::fill_n(rows.head<T>(head) + i * rows.stride(), p.head_dim, T(0));
        }
      };
      clear(grad_q_rows);
      if (!p.shared_qk) clear(grad_k_rows);
      clear(grad_v_rows);
      const T* head_grad_lse =
          grad_lse.defined() ? grad_lse.template const_data_ptr<T>() + head * p.length : nullptr;
      visit_head<T>(out, head, [&](const auto* rows) {
        begin_gradients(
            rows, out.stride(), grad_out.head<std::remove_reference_t<decltype(*rows)>>(head),
            grad_out.stride(), p.length, p.head_dim, p.mask_self && !args.own_values.has_value(),
            lse_data + head * p.length, head_grad_lse, delta.get() + head * p.length,
            silent.get() + head * p.length, grad_v_rows.head<T>(head), grad_v_rows.stride());
      });
      if (p.shared_qk && p.padding.defined()) {  // padding is no query then, nor its cotangent one
        visit_head<T>(grad_out, head, [&](const auto* rows) {
          for (int64_t i = 0; i < p.length; ++i) {
            silent.get()[head * p.length + i] |=
                p.is_padding(head, i) && !is_finite<T>(rows + i * grad_out.stride(), p.head_dim);
          }
        });
      }
    }
  });

  for_each_block(heads, backward_phases(p.line), [&] {
    return [&, scratch = BackwardScratch<T>(p)](int64_t head, const Block& b) mutable {
      Gathered<T>& block = scratch.block;
      T *grad_keys = scratch.grad_keys.get(), *grad_values = scratch.grad_values.get();
      block.read(head, b);
      const int64_t padded = block.padded_rows();
      transpose(block.keys(), p.width, padded, p.head_dim, scratch.keys_t.get(), block.key_stride);
      block.gather_values(grad_values);
      transpose(grad_values, p.width, padded, p.head_dim, scratch.values_t.get(), block.key_stride);
      gather(grad_out, head, p.head_dim, block.query_positions(), b.count * p.line.chunk,
             scratch.grad_out.get(), p.width);
      const uint8_t* head_silent = silent.get() + head * p.length;
      block.clear_queries(head_silent, scratch.grad_out.get());
      if (!p.shared_qk) block.clear_queries(head_silent, block.separate_queries());
      std::fill_n(grad_keys, block.rows * p.width, T(0));
      std::fill_n(grad_values, block.rows * p.width, T(0));
      block.for_each_tile([&](const typename Gathered<T>::Tile& tile) {
        differentiate(scratch, tile, lse_data + head * p.length, delta.get() + head * p.length,
                      head_silent);
        scatter_add(scratch.grad_queries.get(), p.width, block.query_positions() + tile.begin,
                    tile.n, grad_q_rows.head<T>(head), grad_q_rows.stride(), p.head_dim);
      });
      if (p.shared_qk) {
        project(block.keys(), p.width, block.positions(), block.rows,
                p.inverse_norm.get() + head * p.length, p.clamped_inverse(head), p.head_dim,
                grad_keys);
      }
      const Rows& grad_key_rows = p.shared_qk ? grad_q_rows : grad_k_rows;
      scatter_add(grad_keys, p.width, block.positions(), block.rows, grad_key_rows.head<T>(head),
                  grad_key_rows.stride(), p.head_dim);
      scatter_add(grad_values, p.width, block.positions(), block.rows, grad_v_rows.head<T>(head),
                  grad_v_rows.stride(), p.head_dim);
    };
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_attention_backward_cpu(
    const ChunkedAttentionArgs& args, const ChunkedAttentionResults& results) {
  const auto [grad_q, grad_k, grad_v] = chunked_attention_grads(args);
  if (grad_q.numel() == 0) return {grad_q, grad_k, grad_v};
  const at::Tensor computed_q = computing(grad_q), computed_v = computing(grad_v);
  const at::Tensor computed_k = args.shared_qk() ? grad_k : computing(grad_k);
  if (results.lse.scalar_type() == at::kDouble) {
    backward<double>(args, results, computed_q, computed_k, computed_v);
  } else {
    backward<float>(args, results, computed_q, computed_k, computed_v);
  }
  finish(grad_q, computed_q);
  finish(grad_k, computed_k);
  finish(grad_v, computed_v);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_IMPL(reformer, CPU, m) {
  m.impl("chunked_attention", TORCH_FN(chunked_attention_entry<chunked_attention_cpu>));
  m.impl("chunked_attention_backward",
         TORCH_FN(chunked_attention_backward_entry<chunked_attention_backward_cpu>));
}

}  // namespace reformer

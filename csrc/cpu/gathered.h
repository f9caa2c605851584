// What both passes read on the CPU: the problem in the computing type, and the gathered rows of a
// block with its tiles.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "chunked_attention_common.h"
#include "cpu/line.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"

namespace reformer {
namespace {  // chunked_attention_cpu.cpp alone includes this

constexpr int64_t kTileElements = 4096;

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

}  // namespace
}  // namespace reformer

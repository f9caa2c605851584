// Pairs of a query and a key on the CPU: which may attend, how often they meet, what dropout keeps;
// a row of scores to weights, and its gradients.
#pragma once

#include <limits>

#include "kernels/common/dropout.h"
#include "lanes.h"

namespace reformer {
namespace {  // chunked_attention_cpu.cpp alone includes this

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

}  // namespace
}  // namespace reformer

// Counter-based dropout: a pair's fate depends on (seed, batch * heads + head, round, query, key)
// alone, so any tiling, the backward pass and a reversible recompute draw the same mask, on CPU and
// GPU.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace reformer {

// An avalanching permutation of 32-bit words (public-domain "lowbias32" constants).
REFORMER_HOST_DEVICE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  x ^= x >> 16;
  return x;
}

// The key of one query's row of weights in one round, in three steps; head_index = batch * heads +
// head.
REFORMER_HOST_DEVICE uint32_t dropout_head_key(uint64_t seed, uint32_t head_index) {
  uint32_t key = mix32(static_cast<uint32_t>(seed) ^ 0x9e3779b9U);
  key = mix32(key ^ static_cast<uint32_t>(seed >> 32));
  return mix32(key ^ head_index);
}
REFORMER_HOST_DEVICE uint32_t dropout_round_key(uint32_t head_key, uint32_t round) {
  return mix32(head_key ^ round);
}
REFORMER_HOST_DEVICE uint32_t dropout_row_key(uint32_t round_key, uint32_t query) {
  return mix32(round_key ^ query) | 1U;
}
REFORMER_HOST_DEVICE uint32_t dropout_row_key(uint64_t seed, uint32_t head_index, uint32_t round,
                                              uint32_t query) {
  return dropout_row_key(dropout_round_key(dropout_head_key(seed, head_index), round), query);
}

REFORMER_HOST_DEVICE uint32_t dropout_key_part(uint32_t key_position) {
  return mix32(key_position * 0x9e3779b9U) | 1U;
}

// Uniform 32-bit word of a pair, whose upper bits count: multiply-shift hashing of two odd words,
// as there are many pairs of few queries and keys.
REFORMER_HOST_DEVICE uint32_t dropout_word(uint32_t row_key, uint32_t key_part) {
  return row_key * key_part;
}

// A pair is dropped when its word is below this threshold.
REFORMER_HOST_DEVICE uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled >= 4294967295.0 ? 0xffffffffU : static_cast<uint32_t>(scaled);
}

}  // namespace reformer

// The line of chunks on the CPU: all rounds end to end, cut into blocks, and which blocks may run
// at once.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "chunked_attention_common.h"

namespace reformer {
namespace {  // chunked_attention_cpu.cpp alone includes this

constexpr int64_t kBlockRows = 512;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

}  // namespace
}  // namespace reformer

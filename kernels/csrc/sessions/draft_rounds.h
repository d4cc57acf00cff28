// What the draft tokens of a step were chosen from, until verification has judged them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace evospec {

constexpr int kFeatures = 5;  // of a candidate: in the session, after the last token, after the last two, graph, repeat

// The tokens that a row chooses among.
struct Candidates {
  int32_t* tokens;   // [columns]; -1: none
  float* logits;     // [columns], the draft's own; -inf: none
  float* features;   // [kFeatures][columns]
  int32_t columns;
};

// Drafts of a step that were chosen on a GPU. Each round of the block is [rows] tokens, which were chosen, and then
// Candidates of all rows, one array after the other; numbers are 4 bytes each.
struct ScoredRounds {
  int32_t rounds, rows, columns;
  const int32_t* block;

  size_t size() const { return static_cast<size_t>(rows) * columns; }
  const int32_t* candidates(int round) const {
    return block + round * (rows + (2 + kFeatures) * size()) + rows;
  }
};

// A round chooses one token for each row, and a row keeps its number in all rounds of a step. Memory is used again.
class DraftRounds {
 public:
  // A round begins: the first for so many rows, later ones for those that go on. Candidates are undefined before they are
  // written.
  void begin(int round, int rows, int columns) {
    if (round == 0) rows_ = rows;
    if (rounds_.size() <= static_cast<size_t>(round)) rounds_.resize(round + 1);
    Round& one = rounds_[round];
    const size_t size = static_cast<size_t>(rows_) * columns;
    if (one.tokens.size() < size) one.tokens.resize(size), one.logits.resize(size), one.features.resize(size * kFeatures);
    one.columns = columns;
  }

  // As if all of these rounds had been here.
  void take(const ScoredRounds& scored) {
    for (int round = 0; round < scored.rounds; ++round) {
      begin(round, scored.rows, scored.columns);
      const Candidates all = of(round, 0);
      const int32_t* const tokens = scored.candidates(round);
      std::copy_n(tokens, scored.size(), all.tokens);
      std::memcpy(all.logits, tokens + scored.size(), scored.size() * sizeof(float));
      std::memcpy(all.features, tokens + 2 * scored.size(), kFeatures * scored.size() * sizeof(float));
    }
  }

  // A row's of a round; those of the next rows follow.
  Candidates of(int round, int row) {
    Round& one = rounds_[round];
    const size_t at = static_cast<size_t>(row) * one.columns;
    return {one.tokens.data() + at, one.logits.data() + at, one.features.data() + at * kFeatures, one.columns};
  }

 private:
  struct Round {
    std::vector<int32_t> tokens;
    std::vector<float> logits, features;
    int columns = 0;
  };
  std::vector<Round> rounds_;
  int rows_ = 0;
};

}  // namespace evospec

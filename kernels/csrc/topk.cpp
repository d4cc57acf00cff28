#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kFewest = 256;

struct Entry {
  float value;
  int32_t column;

  bool operator<(const Entry& other) const {  // comes first
    return value > other.value || (value == other.value && column < other.column);
  }
};

// Some columns of one row, among them the k best of those offered so far.
class Candidates {
 public:
  explicit Candidates(int k) : k_(k), values_(std::max(4 * k, kFewest) + 16), columns_(values_.size()) {}

  // Takes 16 columns, those of `lanes`, to be called in ascending order.
  void offer(Mask lanes, Floats values, int first_column) {
    const Mask taken = lanes & at_least(values, all(least_));
    if (taken == 0) return;
    store_packed(&values_[count_], taken, values);
    store_packed(&columns_[count_], taken, numbered_from(first_column));
    count_ += static_cast<size_t>(__builtin_popcount(taken));
    if (count_ + 16 > values_.size()) keep_best();
  }

  // The k best in order, where so many were offered.
  const std::vector<Entry>& best() {
    keep_best();
    std::sort(entries_.begin(), entries_.end());
    return entries_;
  }

 private:
  void keep_best() {
    entries_.clear();
    for (size_t i = 0; i < count_; ++i) entries_.push_back({values_[i], columns_[i]});
    if (count_ <= k_) return;
    std::nth_element(entries_.begin(), entries_.begin() + (k_ - 1), entries_.end());
    entries_.resize(k_);
    for (count_ = 0; count_ < k_; ++count_) {
      values_[count_] = entries_[count_].value;
      columns_[count_] = entries_[count_].column;
    }
    // Columns yet to come must be more than equal: of equals the first wins.
    least_ = std::nextafter(entries_.back().value, kInfinity);
  }

  const size_t k_;
  size_t count_ = 0;
  float least_ = -kInfinity;
  std::vector<float> values_;
  std::vector<int32_t> columns_;
  std::vector<Entry> entries_;
};

// Log-probabilities that are wanted, and where they go.
struct LogProbabilities {
  int k;                     // <= columns, or 0
  const int32_t* token_ids;  // [rows]: a token of each
  double* chosen;            // [rows]: its log-probability
  double* largest;           // [rows][k]: the largest of the row in descending order, equals by column
  int32_t* columns;          // [rows][k]: their tokens
};

// The best of a row, in order.
const std::vector<Entry>& best_of(const float* x, int columns, Candidates& candidates) {
  for_each_vector(x, 0, columns, [&](int i, Mask lanes, Floats values) {
    candidates.offer(lanes, maximum(values, all(-kInfinity)), i);
  });
  return candidates.best();
}

}  // namespace

extern "C" void evo_top_k(Team* team, const LogitRows& logits, int k, const int32_t* ids, float* values, int64_t* indices) {
  for_each_item(team, logits.rows, static_cast<size_t>(logits.rows) * logits.columns, [&](int row) {
    Candidates candidates(k);
    const std::vector<Entry>& best = best_of(logits.row(row), logits.columns, candidates);
    for (int i = 0; i < k; ++i) {
      values[row * static_cast<size_t>(k) + i] = best[i].value;
      indices[row * static_cast<size_t>(k) + i] = ids == nullptr ? best[i].column : ids[best[i].column];
    }
  });
}

extern "C" void evo_log_probabilities(Team* team, const LogitRows& logits, const LogProbabilities& wanted) {
  for_each_item(team, logits.rows, static_cast<size_t>(logits.rows) * logits.columns, [&](int i) {
    const float* x = logits.row(i);
    Candidates candidates(std::max(wanted.k, 1));
    const std::vector<Entry>& best = best_of(x, logits.columns, candidates);
    const float highest = best[0].value;
    const double total = std::isinf(highest) ? 0.0 : std::log(weight_sum(x, logits.columns, highest, 1.0f));
    const auto log_probability = [&](float logit) { return static_cast<double>(logit) - highest - total; };
    wanted.chosen[i] = log_probability(x[wanted.token_ids[i]]);
    for (int j = 0; j < wanted.k; ++j) {
      wanted.largest[static_cast<size_t>(i) * wanted.k + j] = log_probability(best[j].value);
      wanted.columns[static_cast<size_t>(i) * wanted.k + j] = best[j].column;
    }
  });
}

}  // namespace evospec

// Work and sums over rows of float32 logits, for everything that chooses tokens.
#pragma once

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace evospec {

// Rows of logits; `stride` floats from one to the next.
struct LogitRows {
  const float* data;
  size_t stride;
  int rows;
  int columns;
  const uint32_t* allowed;          // [rows][words()]: bits of the columns that may be chosen; null: all
  const int32_t* places = nullptr;  // [rows]: where in `data` each row is; null: in their order

  const float* row(int i) const { return data + (places == nullptr ? i : places[i]) * stride; }
  int words() const { return (columns + 31) / 32; }
  const uint32_t* allowed_in(int i) const {
    return allowed == nullptr ? nullptr : allowed + static_cast<size_t>(i) * words();
  }
};

// Smaller jobs are done by the caller alone: to wake the others takes as long.
constexpr size_t kElementsWorthThreads = 1 << 15;

// item(i) for i in 0 .. count - 1, by the team where `elements` are worth it; `team` may be null.
template <typename Item>
void for_each_item(Team* team, int count, size_t elements, Item item) {
  if (team == nullptr || count == 1 || elements < kElementsWorthThreads) {
    for (int i = 0; i < count; ++i) item(i);
    return;
  }
  team->run([&](int) { team->work(count, item); });
}

// Lanes of the 16 columns from `column` on that exist.
inline Mask lanes_from(int column, int columns) {
  const int left = columns - column;
  return left >= 16 ? kAllLanes : static_cast<Mask>((1u << std::max(left, 0)) - 1);
}

// visit(i, lanes, values) for every 16 of x from `begin`, a multiple of 16, to `end`.
//
// Asks for lines long before they are read: what a processor fetches by itself ends with each page of memory, and where
// visits branch as the values say, it looks too little ahead.
template <typename Visit>
void for_each_vector(const float* x, int begin, int end, Visit visit) {
  constexpr int kAhead = 512;
  for (int i = begin; i < end; i += 16) {
    prefetch(x + i + kAhead, 64);
    const Mask lanes = lanes_from(i, end);
    visit(i, lanes, load_lanes(lanes, x + i));
  }
}

// The bits of the 16 columns from `column` on, a multiple of 16; all where `allowed` is null.
inline Mask allowed_lanes(const uint32_t* allowed, int column) {
  return allowed == nullptr ? kAllLanes : static_cast<Mask>(allowed[column / 32] >> (column % 32));
}

// Weight of a logit: exp((x - highest) / temperature), relative error below 3e-7.
class SoftmaxWeight {
 public:
  SoftmaxWeight(float highest, float temperature) : highest_(all(highest)), scale_(all(1.44269504f / temperature)) {}

  Floats operator()(Floats x) const { return exp2_nonpositive((x - highest_) * scale_); }

 private:
  const Floats highest_, scale_;
};

// Sum of weights: a few at a time in float32, which rounds no more than the weights themselves are wrong, and of these sums
// in float64, so that how many there are does not matter.
class WeightSum {
 public:
  void add(Floats weights) {
    few_ = few_ + weights;
    if (++count_ % kFew == 0) take_few();
  }
  double total() {
    take_few();
    return sum_.total();
  }

 private:
  static constexpr unsigned kFew = 8;

  void take_few() {
    sum_.add(few_);
    few_ = all(0.0f);
  }

  Floats few_ = all(0.0f);
  unsigned count_ = 0;
  DoubleSum sum_;
};

// The largest of n values; -inf for none.
float row_max(const float* x, int n);

// Sum of their weights over n values, none above `highest`.
double weight_sum(const float* x, int n, float highest, float temperature);

}  // namespace evospec

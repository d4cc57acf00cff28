#include "truncation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// How far below the highest logit to look at first, in units of the temperature or of 1, whichever is more; then how
// many times farther while that does not suffice, and when to take all of them.
constexpr float kFirstDepth = 8.0f, kDeeper = 2.0f, kDeepest = 32.0f;
constexpr int kSortAt = 64;

// Copies those of n values that are at least `least` (or, kBelow, those that are less) to `out`, which has room for
// n + 16 and may be `x` itself. Returns how many.
template <bool kBelow = false>
int copy_if(const float* x, int n, float least, float* out) {
  const Floats bound = all(least);
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    const Mask lanes = lanes_from(i, n);
    const Floats values = load_lanes(lanes, x + i);
    const Mask taken = lanes & (kBelow ? less(values, bound) : at_least(values, bound));
    if (taken == 0) continue;
    store_packed(out + count, taken, values);
    count += __builtin_popcount(taken);
  }
  return count;
}

float median_of_three(float a, float b, float c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }

// The largest value v with mass of {x >= v} >= target, the smallest value if there is none (quickselect). `x`, n > 0
// values, is used up; `x` and `spare` have room for n + 16.
template <typename Mass>
float select(float* x, int n, double target, float* spare, Mass mass) {
  double above = 0.0;  // mass of the values known to be larger
  while (n > kSortAt) {
    const float pivot = median_of_three(x[n / 4], x[n / 2], x[n / 4 * 3]);
    float cut = pivot;
    int upper = copy_if(x, n, cut, spare);
    if (upper == n) {  // the pivot is the smallest: part its equals from the rest
      if (pivot == kInfinity) return pivot;  // which is nothing
      cut = std::nextafter(pivot, kInfinity);
      upper = copy_if(x, n, cut, spare);
      if (upper == 0) return pivot;
    }
    const double upper_mass = mass(spare, upper);
    if (above + upper_mass < target) {
      above += upper_mass;
      n = copy_if<true>(x, n, cut, x);
    } else {
      n = upper;
      std::swap(x, spare);
    }
  }
  std::sort(x, x + n, std::greater<float>());
  for (int i = 0; i < n; ++i) {
    above += mass(x + i, 1);
    if (above >= target) return x[i];
  }
  return x[n - 1];
}

struct Limits {  // of one row
  float temperature;
  int top_k;  // 0: off
  double top_p, min_p;
};

// The row's values from as far up as possible that include the top_k largest, or else the mass `needed`.
int collect(const float* row, int n, float highest, const Limits& limits, double needed, float* values) {
  for (float depth = kFirstDepth;; depth *= kDeeper) {
    const bool all = depth >= kDeepest;
    const float least = all ? -kInfinity : highest - depth * std::max(limits.temperature, 1.0f);
    const int count = copy_if(row, n, least, values);
    if (all) return count;
    if (limits.top_k > 0 ? count >= limits.top_k
                         : weight_sum(values, count, highest, limits.temperature) >= needed) {
      return count;
    }
  }
}

// The allowed ones of n values.
int copy_allowed(const float* x, int n, const uint32_t* allowed, float* out) {
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    const Mask taken = lanes_from(i, n) & allowed_lanes(allowed, i);
    if (taken == 0) continue;
    store_packed(out + count, taken, load_lanes(taken, x + i));
    count += __builtin_popcount(taken);
  }
  return count;
}

float kept_threshold(const float* row, int n, const uint32_t* allowed, Limits limits) {
  const float temperature = limits.temperature;
  if (temperature == 0.0f) return -kInfinity;
  static thread_local std::vector<float> memory;
  const int room = n + 16;
  memory.resize(3 * static_cast<size_t>(room));
  float *values = memory.data(), *spare = values + room, *copy = spare + room;
  if (allowed != nullptr) {
    n = copy_allowed(row, n, allowed, copy);
    row = copy;
  }
  const float highest = row_max(row, n);
  if (highest == -kInfinity) return -kInfinity;
  float least = limits.min_p > 0.0 ? highest + temperature * static_cast<float>(std::log(limits.min_p)) : -kInfinity;
  if (limits.top_k >= n) limits.top_k = 0;
  if (limits.top_k == 0 && limits.top_p >= 1.0) return least;

  const auto weight = [&](const float* x, int count) { return weight_sum(x, count, highest, temperature); };
  double needed = limits.top_k > 0 ? 0.0 : limits.top_p * weight(row, n);
  int count = collect(row, n, highest, limits, needed, values);
  if (limits.top_k > 0) {
    const float kth = select(values, count, limits.top_k, spare, [](const float*, int size) { return size; });
    least = std::max(least, kth);
    if (limits.top_p >= 1.0) return least;
    count = copy_if(row, n, kth, values);
    needed = limits.top_p * weight(values, count);
  }
  return std::max(least, select(values, count, needed, spare, weight));
}

}  // namespace

void kept_thresholds(Team* team, const LogitRows& logits, const TruncationRows& limits, float* out) {
  for_each_item(team, logits.rows, static_cast<size_t>(logits.rows) * logits.columns, [&](int i) {
    const Limits row{limits.temperatures[i], limits.top_k[i], limits.top_p[i], limits.min_p[i]};
    out[i] = kept_threshold(logits.row(i), logits.columns, logits.allowed_in(i), row);
  });
}

}  // namespace evospec

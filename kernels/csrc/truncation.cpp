#include "truncation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// How far below the highest logit to look at first, in units of the temperature or of 1, whichever is more; for the
// k largest then how many times farther while that does not suffice, and when to take all of them.
constexpr float kFirstDepth = 8.0f, kDeeper = 2.0f, kDeepest = 32.0f;
constexpr int kSortAt = 64;
constexpr int kSampledOneIn = 64;
constexpr float kMargin = 0.3f;  // how far, times the temperature, a nucleus may end from where a sample says it does

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

// The k-th largest of a row's n > k values; the smallest number where fewer are numbers. `values` and `spare`, which
// have room for n + 16, are used up.
float kth_largest(const float* row, int n, int k, float highest, float temperature, float* values, float* spare) {
  int count = 0;
  for (float depth = kFirstDepth; count < k && depth < kDeepest; depth *= kDeeper) {
    count = copy_if(row, n, highest - depth * std::max(temperature, 1.0f), values);
  }
  if (count < k) count = copy_if(row, n, -kInfinity, values);
  return select(values, count, k, spare, [](const float*, int size) { return size; });
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

// Where the largest values of a row reach a part of its mass: mostly among some dozens near the highest. Where not, a
// sample of the others tells about how far to look, so that one pass over the row leaves few to select from. A wrong
// guess costs time: what is returned is found by sums of the row's own weights, and they by the row alone.
class Nucleus {
 public:
  // `values` and `spare`, which have room for n + 16, are used up.
  Nucleus(const float* row, int n, float highest, float temperature, float* values, float* spare)
      : row_(row), n_(n), highest_(highest), temperature_(temperature), values_(values), spare_(spare) {}

  float end(double top_p) const {
    const float near = highest_ - kFirstDepth * std::max(temperature_, 1.0f);
    const int count = copy_if(row_, n_, near, values_);
    const double near_mass = mass(values_, count);
    float* const sample = values_ + count;
    const int sampled = sample_below(near, sample);
    const double guess = top_p * (near_mass + kSampledOneIn * mass(sample, sampled));
    if (near_mass < guess) return far_end(top_p, (guess - near_mass) / kSampledOneIn, sample, sampled);
    const double needed = top_p * mass(row_, n_);
    return near_mass < needed ? end_among_all(needed) : end_among(values_, count, needed);
  }

 private:
  struct Split {
    double total, above;
    int between;
  };

  double mass(const float* x, int n) const { return weight_sum(x, n, highest_, temperature_); }

  float end_among(float* x, int n, double needed) const {
    return select(x, n, needed, spare_, [this](const float* some, int count) { return mass(some, count); });
  }

  float end_among_all(double needed) const {
    const int count = copy_if(row_, n_, -kInfinity, values_);
    return end_among(values_, count, needed);
  }

  // One vector in kSampledOneIn: those of its values that are less than `bound`. Returns how many.
  int sample_below(float bound, float* out) const {
    int count = 0;
    for (int i = 0; i < n_; i += 16 * kSampledOneIn) {
      count += copy_if<true>(row_ + i, std::min(16, n_ - i), bound, out + count);
    }
    return count;
  }

  // The end, where `needed` of a sample's mass tells about where it is.
  float far_end(double top_p, double needed, float* sample, int sampled) const {
    const float about = end_among(sample, sampled, needed), margin = kMargin * temperature_;
    const Split found = split(about - margin, about + margin);
    const double missing = top_p * found.total - found.above;
    const bool is_between = 0.0 < missing && missing <= mass(values_, found.between);
    return is_between ? end_among(values_, found.between, missing) : end_among_all(top_p * found.total);
  }

  // The mass of the row and of its values from `upper` on, and how many are less but at least `lower`: those are in
  // values_ then.
  Split split(float lower, float upper) const {
    const SoftmaxWeight weight(highest_, temperature_);
    DoubleSum total, above;
    int count = 0;
    for (int i = 0; i < n_; i += 16) {
      const Mask lanes = lanes_from(i, n_);
      const Floats x = load_lanes(lanes, row_ + i), weights = choose(lanes, weight(x), all(0.0f));
      const Mask is_above = at_least(x, all(upper)), is_between = lanes & ~is_above & at_least(x, all(lower));
      total.add(weights);
      above.add(choose(is_above, weights, all(0.0f)));
      if (is_between == 0) continue;
      store_packed(values_ + count, is_between, x);
      count += __builtin_popcount(is_between);
    }
    return {total.total(), above.total(), count};
  }

  const float* const row_;
  const int n_;
  const float highest_, temperature_;
  float *const values_, *const spare_;
};

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
  if (limits.top_k > 0 && limits.top_k < n) {
    const float kth = kth_largest(row, n, limits.top_k, highest, temperature, values, spare);
    least = std::max(least, kth);
    if (limits.top_p >= 1.0) return least;
    n = copy_if(row, n, kth, copy);
    row = copy;
  }
  if (limits.top_p >= 1.0) return least;
  return std::max(least, Nucleus(row, n, highest, temperature, values, spare).end(limits.top_p));
}

}  // namespace

void kept_thresholds(Team* team, const LogitRows& logits, const TruncationRows& limits, float* out) {
  for_each_item(team, logits.rows, static_cast<size_t>(logits.rows) * logits.columns, [&](int i) {
    const Limits row{limits.temperatures[i], limits.top_k[i], limits.top_p[i], limits.min_p[i]};
    out[i] = kept_threshold(logits.row(i), logits.columns, logits.allowed_in(i), row);
  });
}

}  // namespace evospec

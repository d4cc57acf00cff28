#include "truncation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kDepth = 8.0f;  // how far below the highest logit a nucleus mostly ends
constexpr int kSortAt = 64;
constexpr int kSampledOneIn = 64;
constexpr float kMargin = 0.3f;  // how far, times the temperature, a nucleus may end from where a sample says it does

// Copies those of n values that are at least `least` (or, kBelow, those that are less) to `out`, which has room for
// n + 16 and may be `x` itself. Returns how many.
template <bool kBelow = false>
int copy_if(const float* x, int n, float least, float* out) {
  const Floats bound = all(least);
  int count = 0;
  for_each_vector(x, 0, n, [&](int, Mask lanes, Floats values) {
    const Mask taken = lanes & (kBelow ? less(values, bound) : at_least(values, bound));
    if (taken == 0) return;
    store_packed(out + count, taken, values);
    count += __builtin_popcount(taken);
  });
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

// Of one vector in kSampledOneIn, the values that are less than `bound`. Returns how many.
int sample_below(const float* x, int n, float bound, float* out) {
  int count = 0;
  for (int i = 0; i < n; i += 16 * kSampledOneIn) {
    count += copy_if<true>(x + i, std::min(16, n - i), bound, out + count);
  }
  return count;
}

struct Limits {  // of one row
  float temperature;
  int top_k;  // 0: off
  double top_p, min_p;
};

struct Largest {
  int count;
  float least;
};

// Copies the k < n largest of n values, and those that tie with the k-th, to `out`; all that are numbers where those are
// fewer. `out`, `values` and `spare` have room for n + 16; the last two are used up.
Largest copy_largest(const float* row, int n, int k, float* out, float* values, float* spare) {
  const auto number = [](const float*, int size) { return size; };
  // So many of a sample are hardly ever among the k largest: the smallest of them is a bound.
  const float share = static_cast<float>(k) / kSampledOneIn;
  const int enough = static_cast<int>(share + 2.0f * std::sqrt(share)) + 5;
  const int sampled = sample_below(row, n, kInfinity, values);
  int count = 0;
  if (enough < sampled) count = copy_if(row, n, select(values, sampled, enough, spare, number), out);
  if (count < k) count = copy_if(row, n, -kInfinity, out);
  if (count == 0) return {0, -kInfinity};
  std::copy_n(out, count, values);
  const float least = select(values, count, k, spare, number);
  return {copy_if(out, count, least, out), least};
}

// The allowed ones of n values.
int copy_allowed(const float* x, int n, const uint32_t* allowed, float* out) {
  int count = 0;
  for_each_vector(x, 0, n, [&](int i, Mask lanes, Floats values) {
    const Mask taken = lanes & allowed_lanes(allowed, i);
    if (taken == 0) return;
    store_packed(out + count, taken, values);
    count += __builtin_popcount(taken);
  });
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
    const float near = highest_ - kDepth;
    float* const sample = values_;
    const int sampled = sample_below(row_, n_, near, sample);
    const double below = kSampledOneIn * mass(sample, sampled);
    if (top_p * (1.0 + below) <= 1.0) return near_end(top_p, near);  // the highest weight is 1
    float* const larger = sample + sampled;
    const int count = copy_if(row_, n_, near, larger);
    const double near_mass = mass(larger, count), missing = top_p * (near_mass + below) - near_mass;
    if (missing > 0.0) return far_end(top_p, missing / kSampledOneIn, sample, sampled);
    const double needed = top_p * mass(row_, n_);
    return near_mass < needed ? end_among_all(needed) : end_among(larger, count, needed);
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

  // The end, where it is hardly below `near`.
  float near_end(double top_p, float near) const {
    const Split found = split(near, kInfinity);
    const double needed = top_p * found.total;
    return mass(values_, found.between) < needed ? end_among_all(needed) : end_among(values_, found.between, needed);
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
    WeightSum total, above;
    int count = 0;
    for_each_vector(row_, 0, n_, [&](int, Mask lanes, Floats x) {
      const Floats weights = choose(lanes, weight(x), all(0.0f));
      const Mask is_above = at_least(x, all(upper)), is_between = lanes & ~is_above & at_least(x, all(lower));
      total.add(weights);
      above.add(choose(is_above, weights, all(0.0f)));
      if (is_between == 0) return;
      store_packed(values_ + count, is_between, x);
      count += __builtin_popcount(is_between);
    });
    return {total.total(), above.total(), count};
  }

  const float* const row_;
  const int n_;
  const float highest_, temperature_;
  float *const values_, *const spare_;
};

float kept_threshold(const float* row, int n, const uint32_t* allowed, Limits limits) {
  const float temperature = limits.temperature;
  const bool keeps_all = limits.top_k <= 0 && limits.top_p >= 1.0 && limits.min_p <= 0.0;
  if (temperature == 0.0f || keeps_all) return -kInfinity;
  static thread_local std::vector<float> memory;
  const int room = n + 16;
  memory.resize(4 * static_cast<size_t>(room));
  float *values = memory.data(), *spare = values + room, *copy = spare + room, *only_allowed = copy + room;
  if (allowed != nullptr) {
    n = copy_allowed(row, n, allowed, only_allowed);
    row = only_allowed;
  }
  float least = -kInfinity;
  if (limits.top_k > 0 && limits.top_k < n) {
    const Largest kept = copy_largest(row, n, limits.top_k, copy, values, spare);
    n = kept.count, row = copy, least = kept.least;
  }
  const float highest = row_max(row, n);
  if (highest == -kInfinity) return -kInfinity;
  if (limits.min_p > 0.0) least = std::max(least, highest + temperature * static_cast<float>(std::log(limits.min_p)));
  if (limits.top_p < 1.0) least = std::max(least, Nucleus(row, n, highest, temperature, values, spare).end(limits.top_p));
  return least;
}

}  // namespace

float kept_threshold(const LogitRows& logits, const TruncationRows& limits, int row) {
  const Limits own{limits.temperatures[row], limits.top_k[row], limits.top_p[row], limits.min_p[row]};
  return kept_threshold(logits.row(row), logits.columns, logits.allowed_in(row), own);
}

extern "C" void evo_kept_thresholds(Team* team, const LogitRows& logits, const TruncationRows& limits, float* out) {
  for_each_item(team, logits.rows, static_cast<size_t>(logits.rows) * logits.columns,
                [&](int row) { out[row] = kept_threshold(logits, limits, row); });
}

}  // namespace evospec

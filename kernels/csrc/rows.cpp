#include "rows.h"

#include <limits>

namespace evospec {

float row_max(const float* x, int n) {
  const Floats lowest = all(-std::numeric_limits<float>::infinity());
  Floats a = lowest, b = lowest;
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    a = maximum(load(x + i), a);
    b = maximum(load(x + i + 16), b);
  }
  for (; i < n; i += 16) {
    const Mask lanes = lanes_from(i, n);
    a = maximum(choose(lanes, load_lanes(lanes, x + i), lowest), a);
  }
  return largest(maximum(a, b));
}

double weight_sum(const float* x, int n, float highest, float temperature) {
  const SoftmaxWeight weight(highest, temperature);
  WeightSum sum;
  for_each_vector(x, 0, n, [&](int, Mask lanes, Floats values) {
    sum.add(choose(lanes, weight(values), all(0.0f)));
  });
  return sum.total();
}

}  // namespace evospec

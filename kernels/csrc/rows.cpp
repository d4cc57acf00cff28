#include "rows.h"

#include <limits>

namespace evospec {

float row_max(const float* x, int n) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 a = lowest, b = lowest;
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    a = _mm512_max_ps(_mm512_loadu_ps(x + i), a);
    b = _mm512_max_ps(_mm512_loadu_ps(x + i + 16), b);
  }
  for (; i < n; i += 16) a = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, lanes_from(i, n), x + i), a);
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

double weight_sum(const float* x, int n, float highest, float temperature) {
  const __m512 top = _mm512_set1_ps(highest), scale = _mm512_set1_ps(1.44269504f / temperature);
  DoubleSum sum;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = lanes_from(i, n);
    sum.add(_mm512_maskz_mov_ps(lanes, softmax_weight(_mm512_maskz_loadu_ps(lanes, x + i), top, scale)));
  }
  return sum.total();
}

}  // namespace evospec

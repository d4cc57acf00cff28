// Sixteen lanes at a time, for all kernels. The same sources are compiled for AVX-512 and for AVX2 (kernels/build.py);
// these are the types and operations that differ:
//
//   Floats, Ints        16 float32 or int32; all(x): the same in every lane, numbered_from(x): x, x + 1, ...
//   Mask                a bit for each lane, the lowest for the first
//   load, store         of 16; load_lanes gives 0 in other lanes, store_lanes leaves them in memory as they are;
//                       store_packed writes the chosen lanes side by side, and may write anything up to 16 values on
//   maximum(a, b)       b where a is NaN
//   less, at_least ...  false where one is NaN; not_less is true there
//   Pairs               32 bf16: two neighbours a lane; OnePair: the same two in every lane
//   add_products        sums + a.first * b.first + a.second * b.second in every lane, in float32
//   DoubleSum           of 16 float32 at a time, in float64: no rounding that would depend on how many there are
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace evospec {

constexpr Mask kAllLanes = 0xFFFF;

inline bf16 to_bf16(float value) {  // round to nearest even, as the hardware does
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<bf16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Asks for cache lines before they are read. kLevel: _MM_HINT_T0 (next), _MM_HINT_T1 (soon: second level only).
template <auto kLevel = _MM_HINT_T0>  // g++ has an enum of hints, clang++ has macros of integers
inline void prefetch(const void* data, size_t bytes) {
  const char* line = static_cast<const char*>(data);
  for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(line + at, kLevel);
}

// 2^x for x <= 0 (softmax); relative error below 2e-7, -inf gives less than 2e-38.
inline Floats exp2_nonpositive(Floats x) {
  x = maximum(x, all(-126.0f));
  const Floats whole = rounded(x), f = x - whole;  // f in [-0.5, 0.5]
  Floats p = all(1.5403530e-4f);
  p = multiply_add(p, f, all(1.3333558e-3f));
  p = multiply_add(p, f, all(9.6181291e-3f));
  p = multiply_add(p, f, all(5.5504109e-2f));
  p = multiply_add(p, f, all(2.4022651e-1f));
  p = multiply_add(p, f, all(6.9314718e-1f));
  p = multiply_add(p, f, all(1.0f));
  return times_power_of_two(p, whole);
}

// x * sigmoid(y)
inline Floats times_sigmoid(Floats x, Floats y) {
  const Floats e = exp2_nonpositive(absolute(y) * all(-1.44269504f));  // exp(-|y|)
  // sigmoid(y) = e / (1 + e) for y < 0
  return choose(less(y, all(0.0f)), x * e, x) / (all(1.0f) + e);
}

// x * sigmoid(x)
inline Floats silu(Floats x) { return times_sigmoid(x, x); }

// GELU by the hyperbolic tangent: x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3)
inline Floats gelu(Floats x) {
  const Floats two_u = x * multiply_add(x * x, all(2 * 0.797884561f * 0.044715f), all(2 * 0.797884561f));
  return times_sigmoid(x, two_u);
}

// gate * sigmoid(1.702 gate) * (up + 1), both cut off at 7, and up at -7 as well (gpt-oss).
inline Floats swiglu_oai(Floats gate, Floats up) {
  const Floats limit = all(7.0f);
  gate = choose(more(gate, limit), limit, gate);
  up = choose(more(up, limit), limit, up);
  up = choose(less(up, all(-7.0f)), all(-7.0f), up);
  return times_sigmoid(gate, gate * all(1.702f)) * (up + all(1.0f));
}

}  // namespace evospec

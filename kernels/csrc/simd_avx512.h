// Sixteen lanes in one AVX-512 register; simd.h tells the operations.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace evospec {

using bf16 = uint16_t;
using Mask = __mmask16;
using Floats = __m512;  // with the operators + - * /
using Ints = __m512i;
using Pairs = __m512bh;
using OnePair = __m512bh;

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Ints all(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints numbered_from(int32_t first) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(lane, all(first));
}

// ---- memory ----

inline Floats load(const float* in) { return _mm512_loadu_ps(in); }
inline Ints load(const int32_t* in) { return _mm512_loadu_si512(in); }
inline Floats load_lanes(Mask lanes, const float* in) { return _mm512_maskz_loadu_ps(lanes, in); }
inline Ints load_lanes(Mask lanes, const int32_t* in) { return _mm512_maskz_loadu_epi32(lanes, in); }
inline void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
inline void store(int32_t* out, Ints x) { _mm512_storeu_si512(out, x); }
inline void store_lanes(float* out, Mask lanes, Floats x) { _mm512_mask_storeu_ps(out, lanes, x); }
inline Floats load_bf16(const bf16* in) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_bf16(bf16* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
inline Floats load_half(const uint16_t* in) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}

// ---- arithmetic ----

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_two(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
template <int kBits>
inline Ints shift_right(Ints x) {
  return _mm512_srli_epi32(x, kBits);
}
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x); }
inline int32_t smallest(Mask lanes, Ints x) { return _mm512_mask_reduce_min_epi32(lanes, x); }

inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats unsigned_to_floats(Ints x) { return _mm512_cvtepu32_ps(x); }
inline Ints bits_of(Floats x) { return _mm512_castps_si512(x); }

// ---- lanes ----

inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask more(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask not_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Floats choose(Mask lanes, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, lanes, yes); }
inline Ints choose(Mask lanes, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, lanes, yes); }
inline void store_packed(float* out, Mask lanes, Floats x) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(lanes, x));
}
inline void store_packed(int32_t* out, Mask lanes, Ints x) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(lanes, x));
}

// ---- pairs ----

inline Pairs load_pairs(const bf16* in) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(in)); }
inline OnePair broadcast_pair(const bf16* in) {
  int32_t pair;
  __builtin_memcpy(&pair, in, 4);
  return reinterpret_cast<OnePair>(_mm512_set1_epi32(pair));
}
inline Floats add_products(Floats sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }

class DoubleSum {
 public:
  void add(Floats values) {
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(_mm512_castps512_ps256(values)));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low_, high_)); }

 private:
  __m512d low_ = _mm512_setzero_pd(), high_ = _mm512_setzero_pd();
};

}  // namespace evospec

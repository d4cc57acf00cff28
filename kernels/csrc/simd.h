// Small AVX-512 helpers shared by all kernels.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace evospec {

using bf16 = uint16_t;

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

inline void store_bf16x16(bf16* out, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

inline __m512 load_bf16x16(const bf16* in) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m512 load_half16(const uint16_t* in) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}

// Asks for cache lines before they are read. kLevel: _MM_HINT_T0 (next), _MM_HINT_T1 (soon: second level only).
template <auto kLevel = _MM_HINT_T0>  // g++ has an enum of hints, clang++ has macros of integers
inline void prefetch(const void* data, size_t bytes) {
  const char* line = static_cast<const char*>(data);
  for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(line + at, kLevel);
}

// A pair of neighbouring bf16 values in every lane.
inline __m512bh broadcast_pair(const bf16* in) {
  int32_t pair;
  std::memcpy(&pair, in, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

inline __m512bh load_pairs(const bf16* in) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(in)); }

// 2^x for x <= 0 (softmax); relative error below 2e-7, -inf gives 0.
inline __m512 exp2_nonpositive(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(x, whole);  // in [-0.5, 0.5]
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// x * sigmoid(x)
inline __m512 silu(__m512 x) {
  __m512 magnitude = _mm512_abs_ps(x);
  __m512 e = exp2_nonpositive(_mm512_mul_ps(magnitude, _mm512_set1_ps(-1.44269504f)));  // exp(-|x|)
  __m512 denominator = _mm512_add_ps(_mm512_set1_ps(1.0f), e);
  __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  __m512 numerator = _mm512_mask_mul_ps(x, negative, x, e);  // sigmoid(x) = e / (1 + e) for x < 0
  return _mm512_div_ps(numerator, denominator);
}

// Operand of _tile_loadconfig: the shape of the eight AMX tile registers.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    bytes_per_row[tile] = static_cast<uint16_t>(num_bytes);
  }
};

}  // namespace evospec

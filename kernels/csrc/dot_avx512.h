// Products of codes with a block's digits, with AVX-512: vpdpbusd multiplies bytes.
#pragma once

#include "codes_avx512.h"

namespace evospec {

constexpr int kDirectRows = 12;   // of one product: their sums fill the registers
// Up to here high and low have sums of their own: with fewer sums an instruction waits for the one before it. More rows
// than that the registers lack.
constexpr int kMaxSplitRows = 8;

// 32 integers as 128 high + low.
struct Digits {
  int8_t high[32], low[32];

  void set(Ints first, Ints second) {  // each in -16319 .. 16319
    const Ints half = all(1 << (kLowBits - 1));
    const Ints high0 = shift_right_signed<kLowBits>(plus(first, half));
    const Ints high1 = shift_right_signed<kLowBits>(plus(second, half));
    store_bytes(high, high0, high1);
    store_bytes(low, minus(first, shift_left<kLowBits>(high0)), minus(second, shift_left<kLowBits>(high1)));
  }

  static constexpr int kLowBits = 7;

 private:
  static void store_bytes(int8_t* out, Ints first, Ints second) {
    __m128i* at = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(at, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128(at + 1, _mm512_cvtepi32_epi8(second));
  }
};

// Quad rows kBegin .. kEnd - 1 of a block as unsigned bytes.
template <int kFormat, int kBegin, int kEnd>
inline __attribute__((always_inline)) void load_codes(const uint8_t* block, __m512i* quads) {
  if constexpr (kFormat == kQ4 || kFormat == kQ5) {
#pragma GCC unroll 4
    for (int j = kBegin / 2; j < kEnd / 2; ++j) unpack_nibbles(block, j, quads[2 * j], quads[2 * j + 1]);
  }
#pragma GCC unroll 8
  for (int quad = kBegin; quad < kEnd; ++quad) {
    if constexpr (kFormat == kQ5) quads[quad] = add_fifth_bits(block, quad, quads[quad]);
    if constexpr (kFormat == kQ8 || kFormat == kQ8x2) quads[quad] = _mm512_loadu_si512(block + 64 * quad);
  }
}

inline __m512i four_bytes(const int8_t* in) {
  int32_t word;
  std::memcpy(&word, in, 4);
  return _mm512_set1_epi32(word);
}

// sums[m] = the integer sums over quad rows kBegin .. kEnd - 1 of row m, in every column, less shifts[m]. Rows take
// turns, so that instructions that follow each other do not wait for each other.
template <int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const uint8_t* block, Row row, const int* shifts, Ints* sums) {
  __m512i quads[kQuads], low[M];
  load_codes<kFormat, kBegin, kEnd>(block, quads);
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_setzero_si512();
    if constexpr (M <= kMaxSplitRows) low[m] = _mm512_set1_epi32(-shifts[m]);
  }
#pragma GCC unroll 8
  for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      sums[m] = _mm512_dpbusd_epi32(sums[m], quads[quad], four_bytes(row(m).digits.high + 4 * quad));
      if constexpr (M <= kMaxSplitRows) {
        low[m] = _mm512_dpbusd_epi32(low[m], quads[quad], four_bytes(row(m).digits.low + 4 * quad));
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_slli_epi32(sums[m], Digits::kLowBits);
    sums[m] = M <= kMaxSplitRows ? _mm512_add_epi32(sums[m], low[m])
                                 : _mm512_sub_epi32(sums[m], _mm512_set1_epi32(shifts[m]));
  }
  if constexpr (M > kMaxSplitRows) {
#pragma GCC unroll 8
    for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        sums[m] = _mm512_dpbusd_epi32(sums[m], quads[quad], four_bytes(row(m).digits.low + 4 * quad));
      }
    }
  }
}

}  // namespace evospec

// Products of codes with a block's digits, with AVX-512: vpdpbusd multiplies bytes.
#pragma once

#include "codes_avx512.h"

namespace evospec {

constexpr int kDirectRows = 12;      // of one product: their sums fill the registers
constexpr bool kHasOneDigit = true;  // whether 8 bits of activations make a product of their own

// Up to so many rows have two sums each, of high and low, or of every other quad row: with fewer sums an instruction
// waits for the one before it. More rows than that the registers lack.
constexpr int max_split_rows(int digits) { return digits == 2 ? 8 : 4; }

template <int kDigits>
struct Digits;

// 32 integers of 8 bits.
template <>
struct Digits<1> {
  int8_t high[32];

  static constexpr int kLargest = 127;

  void set(Ints first, Ints second) { store_bytes(high, first, second); }  // each in -127 .. 127

  static void store_bytes(int8_t* out, Ints first, Ints second) {
    __m128i* at = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(at, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128(at + 1, _mm512_cvtepi32_epi8(second));
  }
};

// 32 integers as 128 high + low, with low in -64 .. 63.
template <>
struct Digits<2> {
  int8_t high[32], low[32];

  static constexpr int kLargest = 128 * 127 + 63;
  static constexpr int kLowBits = 7;

  void set(Ints first, Ints second) {  // each in -16319 .. 16319
    const Ints half = all(1 << (kLowBits - 1));
    const Ints high0 = shift_right_signed<kLowBits>(plus(first, half));
    const Ints high1 = shift_right_signed<kLowBits>(plus(second, half));
    Digits<1>::store_bytes(high, high0, high1);
    Digits<1>::store_bytes(low, minus(first, shift_left<kLowBits>(high0)), minus(second, shift_left<kLowBits>(high1)));
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
template <int kDigits, int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const uint8_t* block, Row row, const int* shifts, Ints* sums) {
  constexpr bool kSplit = M <= max_split_rows(kDigits), kTwo = kDigits == 2;
  __m512i quads[kQuads], others[M];
  load_codes<kFormat, kBegin, kEnd>(block, quads);
  for (int m = 0; m < M; ++m) {
    sums[m] = kTwo ? _mm512_setzero_si512() : _mm512_set1_epi32(-shifts[m]);
    if constexpr (kSplit) others[m] = kTwo ? _mm512_set1_epi32(-shifts[m]) : _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      __m512i& sum = kSplit && !kTwo && quad % 2 ? others[m] : sums[m];
      sum = _mm512_dpbusd_epi32(sum, quads[quad], four_bytes(row(m).digits.high + 4 * quad));
      if constexpr (kTwo && kSplit) {
        others[m] = _mm512_dpbusd_epi32(others[m], quads[quad], four_bytes(row(m).digits.low + 4 * quad));
      }
    }
  }
  if constexpr (kTwo) {
    for (int m = 0; m < M; ++m) {
      sums[m] = _mm512_slli_epi32(sums[m], Digits<2>::kLowBits);
      if constexpr (!kSplit) sums[m] = _mm512_sub_epi32(sums[m], _mm512_set1_epi32(shifts[m]));
    }
  }
  if constexpr (kSplit) {
    for (int m = 0; m < M; ++m) sums[m] = _mm512_add_epi32(sums[m], others[m]);
  }
  if constexpr (kTwo && !kSplit) {
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

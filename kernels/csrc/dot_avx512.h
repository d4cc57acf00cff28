// Products of codes with a block's digits, with AVX-512: vpdpbusd multiplies bytes.
#pragma once

#include "codes_avx512.h"

namespace evospec {

constexpr int kGroupsAtOnce = 2;  // of columns: an activation is then broadcast for both

// Whether codes of a format are multiplied with activations of 8 bits, if wanted.
constexpr bool takes_one_digit(int) { return true; }

// Rows of one product: their sums fill the registers, beside codes.
constexpr int max_rows(int digits) { return digits == 2 ? 4 : 6; }

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
    const Ints high0 = _mm512_srai_epi32(plus(first, half), kLowBits);
    const Ints high1 = _mm512_srai_epi32(plus(second, half), kLowBits);
    Digits<1>::store_bytes(high, high0, high1);
    Digits<1>::store_bytes(low, rest(first, high0), rest(second, high1));
  }

  static Ints rest(Ints values, Ints high) { return _mm512_sub_epi32(values, _mm512_slli_epi32(high, kLowBits)); }
};

inline __m512i four_bytes(const int8_t* in) {
  int32_t word;
  std::memcpy(&word, in, 4);
  return _mm512_set1_epi32(word);
}

// sums[g][m] = the integer sums over quad rows kBegin .. kEnd - 1 of row m, in every column of group g, less shifts[m].
// Rows take turns, so that instructions that follow each other do not wait for each other.
template <int kDigits, int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const uint8_t* blocks, Row row, const int* shifts, Ints (*sums)[M]) {
  constexpr bool kTwo = kDigits == 2;
  Ints high[kGroupsAtOnce][M];  // of two digits; the sums are of the low ones then
  for (int g = 0; g < kGroupsAtOnce; ++g) {
    for (int m = 0; m < M; ++m) {
      sums[g][m] = all(-shifts[m]);
      if constexpr (kTwo) high[g][m] = all(0);
    }
  }
#pragma GCC unroll 4
  for (int j = kBegin / 2; j < kEnd / 2; ++j) {
    __m512i quads[kGroupsAtOnce][2];
    for (int g = 0; g < kGroupsAtOnce; ++g) load_two_quads<kFormat>(blocks + g * block_bytes(kFormat), j, quads[g]);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const int at = 4 * (2 * j + odd);
        const __m512i x = four_bytes(row(m).digits.high + at);
        for (int g = 0; g < kGroupsAtOnce; ++g) {
          Ints& sum = kTwo ? high[g][m] : sums[g][m];
          sum = _mm512_dpbusd_epi32(sum, quads[g][odd], x);
        }
        if constexpr (kTwo) {
          const __m512i low = four_bytes(row(m).digits.low + at);
          for (int g = 0; g < kGroupsAtOnce; ++g) sums[g][m] = _mm512_dpbusd_epi32(sums[g][m], quads[g][odd], low);
        }
      }
    }
  }
  if constexpr (kTwo) {
    for (int g = 0; g < kGroupsAtOnce; ++g) {
      for (int m = 0; m < M; ++m) sums[g][m] = plus(sums[g][m], _mm512_slli_epi32(high[g][m], Digits<2>::kLowBits));
    }
  }
}

}  // namespace evospec

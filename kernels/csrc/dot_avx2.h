// Products of codes with a block's integers, with AVX2: vpmaddwd multiplies pairs of 16 bits, exactly.
//
// vpmaddubsw, the nearest to AVX-512's vpdpbusd, would need as many instructions (two digits), and 8-bit codes would
// overflow its sums.
#pragma once

#include "matrix.h"

namespace evospec {

constexpr int kGroupsAtOnce = 1;      // of columns: there are half as many registers
constexpr bool kHasOneDigit = false;  // products of 16 bits are as fast as those of 8 would be

// Rows of one product: their sums fill the registers.
constexpr int max_rows(int) { return 5; }

template <int kDigits>
struct Digits;

// 32 integers in the order of code pairs: of each four, 0 and 2, then 1 and 3.
template <>
struct Digits<2> {
  int16_t pairs[32];

  static constexpr int kLargest = 128 * 127 + 63;  // as with AVX-512

  void set(Ints first, Ints second) {  // each in -16319 .. 16319
    store_pairs(pairs, first);
    store_pairs(pairs + 16, second);
  }

 private:
  static void store_pairs(int16_t* out, Ints values) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(values.low, values.high), 0xD8);
    const __m256i swapped = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), swapped);
  }
};

// Of quad row `quad`, for eight columns (half 0 or 1 of a group): codes 0 and 2 of each, or 1 and 3 where odd is 1, as
// pairs of 16 bits.
template <int kFormat>
inline __attribute__((always_inline)) __m256i code_pairs(const uint8_t* block, int quad, int odd, int half) {
  if constexpr (kFormat == kQ8 || kFormat == kQ8x2) {
    const __m256i bytes = _mm256_loadu_si256(vector_at(block + 64 * quad + 32 * half));
    return odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, _mm256_set1_epi16(255));
  }
  const __m256i bytes = _mm256_loadu_si256(vector_at(block + 64 * (quad / 2) + 32 * half));
  const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, quad % 2 * 4 + odd * 8), _mm256_set1_epi16(15));
  if constexpr (kFormat == kQ4) return nibbles;
  const __m256i words = _mm256_loadu_si256(vector_at(block + 256 + 32 * half));
  const int bit = fifth_bit(4 * quad + odd);  // goes to bit 4
  const __m256i fifths = bit < 4 ? _mm256_slli_epi32(words, 4 - bit) : _mm256_srli_epi32(words, bit - 4);
  return _mm256_or_si256(nibbles, _mm256_and_si256(fifths, _mm256_set1_epi16(16)));
}

// The compiler must not see through it: it would make all products first, since integers may be added in any order, and
// lack registers to keep them in (three to four times slower).
inline __attribute__((always_inline)) void add(__m256i& sum, __m256i product) {
  sum = _mm256_add_epi32(sum, product);
  asm("" : "+x"(sum));
}

// sums[0][m] = the integer sums over quad rows kBegin .. kEnd - 1 of row m, in every column, less shifts[m].
template <int kDigits, int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const uint8_t* block, Row row, const int* shifts, Ints (*sums)[M]) {
  for (int m = 0; m < M; ++m) sums[0][m] = all(-shifts[m]);
#pragma GCC unroll 8
  for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i low = code_pairs<kFormat>(block, quad, odd, 0), high = code_pairs<kFormat>(block, quad, odd, 1);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, row(m).digits.pairs + 4 * quad + 2 * odd, 4);
        const __m256i x = _mm256_set1_epi32(pair);
        add(sums[0][m].low, _mm256_madd_epi16(low, x));
        add(sums[0][m].high, _mm256_madd_epi16(high, x));
      }
    }
  }
}

}  // namespace evospec

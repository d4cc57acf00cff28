// Products of codes with a block's integers, with AVX2. Two digits: vpmaddwd multiplies pairs of 16 bits, exactly.
// One: vpmaddubsw multiplies pairs of bytes into 16 bits, which codes of up to six bits do not overflow; those of eight
// would, and keep two digits.
#pragma once

#include "matrix.h"

namespace evospec {

constexpr int kGroupsAtOnce = 1;  // of columns: there are half as many registers

// Whether codes of a format are multiplied with activations of 8 bits, if wanted.
constexpr bool takes_one_digit(int format) { return format != kQ8; }

// Rows of one product: their sums fill the registers.
constexpr int max_rows(int) { return 5; }

template <int kDigits>
struct Digits;

// 32 integers of 8 bits.
template <>
struct Digits<1> {
  int8_t high[32];

  static constexpr int kLargest = 127;

  void set(Ints first, Ints second) {  // each in -127 .. 127
    const __m256i words0 = _mm256_packs_epi32(first.low, first.high), words1 = _mm256_packs_epi32(second.low, second.high);
    const __m256i bytes = _mm256_packs_epi16(words0, words1);  // packed in halves of 128 bits: fours are out of order
    const __m256i in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), in_order);
  }
};

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

// The words of eight columns' fifth bits, shifted so that the one of k = kk is in place.
inline __attribute__((always_inline)) __m256i fifth_bits(const uint8_t* block, int kk, int half) {
  const __m256i words = _mm256_loadu_si256(vector_at(block + 256 + 32 * half));
  const int bit = fifth_bit(kk);  // goes to bit 4
  return bit < 4 ? _mm256_slli_epi32(words, 4 - bit) : _mm256_srli_epi32(words, bit - 4);
}

// Of quad row `quad`, for eight columns (half 0 or 1 of a group): codes 0 and 2 of each, or 1 and 3 where odd is 1, as
// pairs of 16 bits.
template <int kFormat>
inline __attribute__((always_inline)) __m256i code_pairs(const uint8_t* block, int quad, int odd, int half) {
  if constexpr (has_whole_bytes(kFormat)) {
    const __m256i bytes = _mm256_loadu_si256(vector_at(block + 64 * quad + 32 * half));
    return odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, _mm256_set1_epi16(255));
  }
  const __m256i bytes = _mm256_loadu_si256(vector_at(block + 64 * (quad / 2) + 32 * half));
  const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, quad % 2 * 4 + odd * 8), _mm256_set1_epi16(15));
  if constexpr (kFormat == kQ4) return nibbles;
  return _mm256_or_si256(nibbles, _mm256_and_si256(fifth_bits(block, 4 * quad + odd, half), _mm256_set1_epi16(16)));
}

// Of quad row `quad`, for eight columns (half 0 or 1 of a group): the four codes of each, as bytes.
template <int kFormat>
inline __attribute__((always_inline)) __m256i code_fours(const uint8_t* block, int quad, int half) {
  if constexpr (has_whole_bytes(kFormat)) return _mm256_loadu_si256(vector_at(block + 64 * quad + 32 * half));
  const __m256i bytes = _mm256_loadu_si256(vector_at(block + 64 * (quad / 2) + 32 * half));
  const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, quad % 2 * 4), _mm256_set1_epi8(15));
  if constexpr (kFormat == kQ4) return nibbles;
  return _mm256_or_si256(nibbles, _mm256_and_si256(fifth_bits(block, 4 * quad, half), _mm256_set1_epi8(16)));
}

// The compiler must not see through it: it would make all products first, since integers may be added in any order, and
// lack registers to keep them in (three to four times slower).
inline __attribute__((always_inline)) void keep(__m256i& sum) { asm("" : "+x"(sum)); }

// sums[0][m] = the integer sums over quad rows kBegin .. kEnd - 1 of row m, in every column, less shifts[m].
template <int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot_one_digit(const uint8_t* block, Row row, const int* shifts, Ints (*sums)[M]) {
  // Sums of 16 bits hold the products of so many quad rows: 8 * 2 * 15 * 127 is below 2^15, as are 4 * 2 * 31 * 127 and
  // 2 * 2 * 63 * 127.
  constexpr int kAtOnce = kFormat == kQ4 ? 8 : kFormat == kQ5 ? 4 : 2;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int m = 0; m < M; ++m) sums[0][m] = all(-shifts[m]);
#pragma GCC unroll 4
  for (int begin = kBegin; begin < kEnd; begin += kAtOnce) {
    Ints words[M];
#pragma GCC unroll 8
    for (int quad = begin; quad < begin + kAtOnce; ++quad) {
      const __m256i low = code_fours<kFormat>(block, quad, 0), high = code_fours<kFormat>(block, quad, 1);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t four;
        std::memcpy(&four, row(m).digits.high + 4 * quad, 4);
        const __m256i x = _mm256_set1_epi32(four);
        const __m256i low_products = _mm256_maddubs_epi16(low, x), high_products = _mm256_maddubs_epi16(high, x);
        words[m].low = quad == begin ? low_products : _mm256_add_epi16(words[m].low, low_products);
        words[m].high = quad == begin ? high_products : _mm256_add_epi16(words[m].high, high_products);
        keep(words[m].low);
        keep(words[m].high);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      sums[0][m] = plus(sums[0][m], {_mm256_madd_epi16(words[m].low, ones), _mm256_madd_epi16(words[m].high, ones)});
    }
  }
}

template <int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot_two_digits(const uint8_t* block, Row row, const int* shifts, Ints (*sums)[M]) {
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
        sums[0][m] = plus(sums[0][m], {_mm256_madd_epi16(low, x), _mm256_madd_epi16(high, x)});
        keep(sums[0][m].low);
        keep(sums[0][m].high);
      }
    }
  }
}

template <int kDigits, int M, int kFormat, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const uint8_t* block, Row row, const int* shifts, Ints (*sums)[M]) {
  if constexpr (kDigits == 1) {
    dot_one_digit<M, kFormat, kBegin, kEnd>(block, row, shifts, sums);
  } else {
    dot_two_digits<M, kFormat, kBegin, kEnd>(block, row, shifts, sums);
  }
}

}  // namespace evospec

// Codes of less than eight bits as bytes, with AVX-512.
#pragma once

#include "matrix.h"

namespace evospec {

// Quad rows 2j and 2j + 1 of a block of kQ4, or the lower four bits of one of kQ5.
inline void unpack_nibbles(const uint8_t* block, int j, __m512i& even, __m512i& odd) {
  const __m512i mask = _mm512_set1_epi8(15), both = _mm512_loadu_si512(block + 64 * j);
  even = _mm512_and_si512(both, mask);
  odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}

// The fifth bits of quad row `quad` of a kQ5 block, added to its nibbles.
inline __m512i add_fifth_bits(const uint8_t* block, int quad, __m512i nibbles) {
  // Byte j of a column's word takes the eight bits that begin four below bit k = 4 quad + j, so that it becomes bit 4.
  const int64_t base = 0x0302010003020100, upper_word = 0x2020202000000000;
  const __m512i first_bit = _mm512_set1_epi64(base + upper_word + 0x0101010101010101 * ((4 * quad + 60) % 64));
  const __m512i words = _mm512_loadu_si512(block + 256);
  const __m512i bits = _mm512_multishift_epi64_epi8(first_bit, words);
  return _mm512_ternarylogic_epi32(nibbles, bits, _mm512_set1_epi8(16), 0xF8);  // nibbles | (bits & 16)
}

// Quad rows 2j and 2j + 1 of a block of codes as unsigned bytes.
template <int kFormat>
inline __attribute__((always_inline)) void load_two_quads(const uint8_t* block, int j, __m512i* quads) {
  if constexpr (has_whole_bytes(kFormat)) {
    quads[0] = _mm512_loadu_si512(block + 128 * j);
    quads[1] = _mm512_loadu_si512(block + 128 * j + 64);
  } else {
    unpack_nibbles(block, j, quads[0], quads[1]);
  }
  if constexpr (kFormat == kQ5) {
    quads[0] = add_fifth_bits(block, 2 * j, quads[0]);
    quads[1] = add_fifth_bits(block, 2 * j + 1, quads[1]);
  }
}

}  // namespace evospec

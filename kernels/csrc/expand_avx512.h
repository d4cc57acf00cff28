// Blocks of codes as bf16 tiles; with AVX2 codes are always multiplied as they are (direct.h).
#pragma once

#include "codes_avx512.h"

namespace evospec {

// Values of columns 0..15 at k = 2r and at 2r + 1 -> pair row r.
inline void store_pair_row(bf16* out, __m512 even, __m512 odd) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleaved, both));
}

// The permutation looks at the lowest four bits only, so that a shift is all it takes to get at a nibble.
inline void expand_q4(const uint8_t* block, bf16* out) {
  const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ4));
  const __m512 s = load_half(scales), m = load_half(scales + kGroup);
  for (int j = 0; j < kQuads / 2; ++j) {
    const __m512i codes = _mm512_loadu_si512(block + 64 * j);
    auto value = [&](int nibble) {
      const __m512i shifted = _mm512_srli_epi32(codes, 4 * nibble);
      return _mm512_fmadd_ps(_mm512_permutexvar_ps(shifted, table), s, m);
    };
    for (int odd = 0; odd < 2; ++odd) {
      bf16* rows = out + 64 * (2 * j + odd);
      store_pair_row(rows, value(odd), value(2 + odd));
      store_pair_row(rows + 32, value(4 + odd), value(6 + odd));
    }
  }
}

inline void expand_q5(const uint8_t* block, bf16* out) {
  const __m512 low = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16);
  const __m512 high = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 s = load_half(reinterpret_cast<const uint16_t*>(block + code_bytes(kQ5)));
  for (int j = 0; j < kQuads / 2; ++j) {
    __m512i quads[2];
    load_two_quads<kQ5>(block, j, quads);
    for (int odd = 0; odd < 2; ++odd) {
      auto value = [&](int byte) {  // as above: the lowest five bits
        return _mm512_mul_ps(_mm512_permutex2var_ps(low, _mm512_srli_epi32(quads[odd], 8 * byte), high), s);
      };
      bf16* rows = out + 64 * (2 * j + odd);
      store_pair_row(rows, value(0), value(1));
      store_pair_row(rows + 32, value(2), value(3));
    }
  }
}

inline void expand_bytes(const uint8_t* block, int format, bf16* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(format));
  const __m512i mask = _mm512_set1_epi32(255);
  for (int quad = 0; quad < kQuads; ++quad) {
    const __m512 s = load_half(scales + (format == kQ6 && quad >= kQuads / 2 ? kGroup : 0));
    const __m512 minimum = _mm512_mul_ps(s, _mm512_set1_ps(static_cast<float>(-code_offset(format))));
    const __m512i codes = _mm512_loadu_si512(block + 64 * quad);
    auto value = [&](int byte) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * byte), mask);
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), s, minimum);
    };
    store_pair_row(out + 64 * quad, value(0), value(1));
    store_pair_row(out + 64 * quad + 32, value(2), value(3));
  }
}

// Expands blocks first .. first + count - 1 of both groups of a pair to bf16 tiles: out[count][2][16][32].
inline void expand_blocks(const Matrix& matrix, int pair, int first, int count, const ReadAhead& ahead, bf16* out) {
  const size_t bytes = block_bytes(matrix.format);
  const uint8_t* block = matrix.pair(pair) + 2 * first * bytes;
  for (int b = 0; b < 2 * count; ++b, block += bytes, out += kBlock * kGroup) {
    if (b % 2 == 0) ahead.prefetch_behind(block, 2 * bytes);
    if (matrix.format == kQ4) {
      expand_q4(block, out);
    } else if (matrix.format == kQ5) {
      expand_q5(block, out);
    } else {
      expand_bytes(block, matrix.format, out);
    }
  }
}

}  // namespace evospec

#include "matrix.h"

namespace evospec {

namespace {

inline uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float half_to_float(uint16_t value) { return _cvtsh_ss(value); }

// Values of columns 0..15 at k = 2r and at 2r + 1 -> pair row r.
inline void store_pair_row(bf16* out, __m512 even, __m512 odd) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleaved, both));
}

// The permutation looks at the lowest four bits only, so that a shift is all it takes to get at a nibble.
void expand_q4(const uint8_t* block, bf16* out) {
  const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ4));
  const __m512 s = load_half16(scales), m = load_half16(scales + kGroup);
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

void expand_q5(const uint8_t* block, bf16* out) {
  const __m512 low = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16);
  const __m512 high = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 s = load_half16(reinterpret_cast<const uint16_t*>(block + code_bytes(kQ5)));
  for (int j = 0; j < kQuads / 2; ++j) {
    __m512i codes[2];
    unpack_nibbles(block, j, codes[0], codes[1]);
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i quad = add_fifth_bits(block, 2 * j + odd, codes[odd]);
      auto value = [&](int byte) {  // as above: the lowest five bits
        return _mm512_mul_ps(_mm512_permutex2var_ps(low, _mm512_srli_epi32(quad, 8 * byte), high), s);
      };
      bf16* rows = out + 64 * (2 * j + odd);
      store_pair_row(rows, value(0), value(1));
      store_pair_row(rows + 32, value(2), value(3));
    }
  }
}

void expand_q8(const uint8_t* block, bool two_scales, bf16* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ8));
  const __m512i mask = _mm512_set1_epi32(255);
  for (int quad = 0; quad < kQuads; ++quad) {
    const __m512 s = load_half16(scales + (two_scales && quad >= kQuads / 2 ? kGroup : 0));
    const __m512 minimum = _mm512_mul_ps(s, _mm512_set1_ps(-128.0f));
    const __m512i codes = _mm512_loadu_si512(block + 64 * quad);
    auto value = [&](int byte) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * byte), mask);
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), s, minimum);
    };
    store_pair_row(out + 64 * quad, value(0), value(1));
    store_pair_row(out + 64 * quad + 32, value(2), value(3));
  }
}

void set_code(uint8_t* block, int format, int kk, int column, uint8_t code) {
  const int quad = kk / 4, p = column * 4 + kk % 4;
  if (format == kQ8 || format == kQ8x2) {
    block[64 * quad + p] = code;
    return;
  }
  block[64 * (quad / 2) + p] |= static_cast<uint8_t>((code & 15) << (4 * (quad % 2)));
  if (format == kQ5) reinterpret_cast<uint32_t*>(block + 256)[column] |= static_cast<uint32_t>(code >> 4) << kk;
}

// The code as a number: without the offset of its format.
int get_code(const uint8_t* block, int format, int kk, int column) {
  const int quad = kk / 4, p = column * 4 + kk % 4;
  if (format == kQ8 || format == kQ8x2) return block[64 * quad + p] - 128;
  const int nibble = (block[64 * (quad / 2) + p] >> (4 * (quad % 2))) & 15;
  if (format == kQ4) return nibble;
  const uint32_t word = reinterpret_cast<const uint32_t*>(block + 256)[column];
  return nibble + static_cast<int>(16 * ((word >> kk) & 1)) - 16;
}

}  // namespace

void pack_codes(uint8_t* data, int k, int row, const RowCodes& codes) {
  const int column = row % kGroup, blocks = k / kBlock;
  uint8_t* block = data + static_cast<size_t>(row / kGroup) * blocks * block_bytes(codes.format);
  for (int b = 0; b < blocks; ++b, block += block_bytes(codes.format)) {
    for (int kk = 0; kk < kBlock; ++kk) set_code(block, codes.format, kk, column, codes.codes[b * kBlock + kk]);
    uint16_t* scales = reinterpret_cast<uint16_t*>(block + code_bytes(codes.format));
    scales[column] = to_half(codes.scales[2 * b]);
    if (codes.format == kQ8x2) scales[kGroup + column] = to_half(codes.scales[2 * b + 1]);
    if (codes.format == kQ4) scales[kGroup + column] = to_half(codes.minima[b]);
  }
}

void pack_floats(uint8_t* data, int k, int row, const float* values) {
  bf16* group = reinterpret_cast<bf16*>(data) + static_cast<size_t>(row / kGroup) * k * kGroup;
  for (int i = 0; i < k; ++i) {
    const int kk = i % kBlock;
    bf16* block = group + static_cast<size_t>(i / kBlock) * kBlock * kGroup;
    block[32 * (kk / 2) + 2 * (row % kGroup) + kk % 2] = to_bf16(values[i]);
  }
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const uint8_t* block = matrix.group(row / kGroup);
  const int column = row % kGroup, format = matrix.format;
  for (int b = 0; b < matrix.num_blocks(); ++b, block += block_bytes(format)) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(format));
    for (int kk = 0; kk < kBlock; ++kk) {
      float& value = out[b * kBlock + kk];
      if (format == kBf16) {
        value = to_float(reinterpret_cast<const bf16*>(block)[32 * (kk / 2) + 2 * column + kk % 2]);
        continue;
      }
      const int scale_index = column + (format == kQ8x2 && kk >= kBlock / 2 ? kGroup : 0);
      const float minimum = format == kQ4 ? half_to_float(scales[kGroup + column]) : 0.0f;
      value = half_to_float(scales[scale_index]) * get_code(block, format, kk, column) + minimum;
    }
  }
}

void expand_blocks(const Matrix& matrix, int group, int first, int count, bf16* out) {
  const size_t bytes = block_bytes(matrix.format);
  const uint8_t* block = matrix.group(group) + first * bytes;
  for (int b = 0; b < count; ++b, block += bytes, out += kBlock * kGroup) {
    prefetch_ahead(block, matrix.format);
    if (matrix.format == kQ4) {
      expand_q4(block, out);
    } else if (matrix.format == kQ5) {
      expand_q5(block, out);
    } else {
      expand_q8(block, matrix.format == kQ8x2, out);
    }
  }
}

}  // namespace evospec

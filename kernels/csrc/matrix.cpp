#include "matrix.h"

namespace evospec {

namespace {

// Position of (k inside the block, column inside the group) in a pair row.
inline int pair_row(int kk) { return kk / 2; }
inline int position(int kk, int column) { return column * 2 + kk % 2; }

inline uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float half_to_float(uint16_t value) { return _cvtsh_ss(value); }

// Rows a 16-bit lane holds, and the bits of a code, in the lane formats.
inline int rows_per_lane(int format) { return format == kQ4 ? 4 : 3; }
inline int code_bits(int format) { return format == kQ4 ? 4 : 5; }

inline __m512 lower_columns(__m512 per_column) {  // columns 0..7, each twice
  return _mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), per_column);
}
inline __m512 upper_columns(__m512 per_column) {  // columns 8..15, each twice
  return _mm512_permutexvar_ps(
      _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8), per_column);
}

inline void store_pair_row(bf16* out, __m512 lower, __m512 upper) {
  _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(upper, lower)));
}

void expand_q4(const uint8_t* block, bf16* out) {
  const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ4));
  const __m512 s = load_half16(scales), m = load_half16(scales + kGroup);
  const __m512 s0 = lower_columns(s), s1 = upper_columns(s), m0 = lower_columns(m), m1 = upper_columns(m);
  for (int j = 0; j < 4; ++j) {
    const __m256i* lanes = reinterpret_cast<const __m256i*>(block + 64 * j);
    __m512i lower = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes));
    __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes + 1));
    for (int i = 0; i < 4; ++i) {  // the permutation looks at the lowest four bits only
      __m512 w0 = _mm512_fmadd_ps(_mm512_permutexvar_ps(lower, table), s0, m0);
      __m512 w1 = _mm512_fmadd_ps(_mm512_permutexvar_ps(upper, table), s1, m1);
      store_pair_row(out + 32 * (4 * j + i), w0, w1);
      lower = _mm512_srli_epi32(lower, 4);
      upper = _mm512_srli_epi32(upper, 4);
    }
  }
}

void expand_q5(const uint8_t* block, bf16* out) {
  const __m512 low = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16);
  const __m512 high = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 s = load_half16(reinterpret_cast<const uint16_t*>(block + code_bytes(kQ5)));
  const __m512 s0 = lower_columns(s), s1 = upper_columns(s);
  for (int r = 0; r < kPairs; ++r) {
    const __m256i* lanes = reinterpret_cast<const __m256i*>(block + 64 * (r / 3));
    const unsigned shift = 5 * (r % 3);
    __m512i lower = _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes)), shift);
    __m512i upper = _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(lanes + 1)), shift);
    __m512 w0 = _mm512_mul_ps(_mm512_permutex2var_ps(low, lower, high), s0);
    __m512 w1 = _mm512_mul_ps(_mm512_permutex2var_ps(low, upper, high), s1);
    store_pair_row(out + 32 * r, w0, w1);
  }
}

void expand_q8(const uint8_t* block, bool two_scales, bf16* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ8));
  __m512 s = load_half16(scales);
  __m512 s0 = lower_columns(s), s1 = upper_columns(s);
  for (int r = 0; r < kPairs; ++r) {
    if (two_scales && r == kPairs / 2) {
      s = load_half16(scales + kGroup);
      s0 = lower_columns(s), s1 = upper_columns(s);
    }
    const __m128i* codes = reinterpret_cast<const __m128i*>(block + 32 * r);
    __m512 q0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes)));
    __m512 q1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1)));
    store_pair_row(out + 32 * r, _mm512_mul_ps(q0, s0), _mm512_mul_ps(q1, s1));
  }
}

void set_code(uint8_t* block, int format, int kk, int column, int8_t code) {
  const int r = pair_row(kk), p = position(kk, column);
  if (format == kQ8 || format == kQ8x2) {
    block[32 * r + p] = static_cast<uint8_t>(code);
    return;
  }
  const int rows = rows_per_lane(format), bits = code_bits(format);
  uint16_t* lane = reinterpret_cast<uint16_t*>(block) + 32 * (r / rows) + p;
  *lane = static_cast<uint16_t>(*lane | (static_cast<uint16_t>(code) << (bits * (r % rows))));
}

int get_code(const uint8_t* block, int format, int kk, int column) {
  const int r = pair_row(kk), p = position(kk, column);
  if (format == kQ8 || format == kQ8x2) return static_cast<int8_t>(block[32 * r + p]);
  const int rows = rows_per_lane(format), bits = code_bits(format);
  const uint16_t lane = reinterpret_cast<const uint16_t*>(block)[32 * (r / rows) + p];
  const int code = (lane >> (bits * (r % rows))) & ((1 << bits) - 1);
  return format == kQ5 ? code - 16 : code;
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
    block[32 * pair_row(kk) + position(kk, row % kGroup)] = to_bf16(values[i]);
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
        value = to_float(reinterpret_cast<const bf16*>(block)[32 * pair_row(kk) + position(kk, column)]);
        continue;
      }
      const int scale_index = column + (format == kQ8x2 && kk >= kBlock / 2 ? kGroup : 0);
      const float minimum = format == kQ4 ? half_to_float(scales[kGroup + column]) : 0.0f;
      value = half_to_float(scales[scale_index]) * get_code(block, format, kk, column) + minimum;
    }
  }
}

void expand_group(const Matrix& matrix, int group, bf16* out) {
  const uint8_t* block = matrix.group(group);
  const size_t bytes = block_bytes(matrix.format);
  for (int b = 0; b < matrix.num_blocks(); ++b, block += bytes, out += kBlock * kGroup) {
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

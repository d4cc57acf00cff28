#include "direct.h"

namespace evospec {

namespace {

constexpr int kMaxSplitRows = 3;  // up to here high and low have sums of their own, more than that the registers lack
constexpr int kLowBits = 7;
constexpr float kLargest = (127 << kLowBits) + 63;  // of 128 high + low, with low in -64 .. 63
constexpr float kSmallest = 1e-30f;  // a block below it counts as zeros: its inverse could overflow

inline void store_bytes(int8_t* out, __m512i first, __m512i second) {
  __m128i* at = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(at, _mm512_cvtepi32_epi8(first));
  _mm_storeu_si128(at + 1, _mm512_cvtepi32_epi8(second));
}

// The offset of a format's codes.
constexpr int offset(int format) { return format == kQ4 ? 0 : format == kQ5 ? 16 : 128; }

// The quad rows of a block as unsigned bytes.
template <int kFormat>
inline __attribute__((always_inline)) void load_codes(const uint8_t* block, __m512i* quads) {
  if constexpr (kFormat == kQ4 || kFormat == kQ5) {
#pragma GCC unroll 4
    for (int j = 0; j < kQuads / 2; ++j) unpack_nibbles(block, j, quads[2 * j], quads[2 * j + 1]);
  }
#pragma GCC unroll 8
  for (int quad = 0; quad < kQuads; ++quad) {
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
template <int M, int kBegin, int kEnd, typename Row>
inline __attribute__((always_inline)) void dot(const __m512i* quads, Row row, const int* shifts, __m512i* sums) {
  __m512i low[M];
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_setzero_si512();
    if constexpr (M <= kMaxSplitRows) low[m] = _mm512_set1_epi32(-shifts[m]);
  }
#pragma GCC unroll 8
  for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      sums[m] = _mm512_dpbusd_epi32(sums[m], quads[quad], four_bytes(row(m).high + 4 * quad));
      if constexpr (M <= kMaxSplitRows) {
        low[m] = _mm512_dpbusd_epi32(low[m], quads[quad], four_bytes(row(m).low + 4 * quad));
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_slli_epi32(sums[m], kLowBits);
    sums[m] = M <= kMaxSplitRows ? _mm512_add_epi32(sums[m], low[m])
                                 : _mm512_sub_epi32(sums[m], _mm512_set1_epi32(shifts[m]));
  }
  if constexpr (M > kMaxSplitRows) {
#pragma GCC unroll 8
    for (int quad = kBegin; quad < kEnd; ++quad) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        sums[m] = _mm512_dpbusd_epi32(sums[m], quads[quad], four_bytes(row(m).low + 4 * quad));
      }
    }
  }
}

}  // namespace

void DirectRows::assign(const bf16* x, int rows, int k) {
  blocks_ = k / kBlock;
  if (data_.size() < static_cast<size_t>(rows) * blocks_) data_.resize(static_cast<size_t>(rows) * blocks_);
  for (size_t i = 0; i < static_cast<size_t>(rows) * blocks_; ++i) {
    Block& out = data_[i];
    const __m512 x0 = load_bf16x16(x + i * kBlock), x1 = load_bf16x16(x + i * kBlock + 16);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
    const float scale = largest / kLargest;
    const __m512 inverse = _mm512_set1_ps(largest > kSmallest ? kLargest / largest : 0.0f);
    const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse));
    const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse));
    const __m512i half = _mm512_set1_epi32(1 << (kLowBits - 1));
    const __m512i high0 = _mm512_srai_epi32(_mm512_add_epi32(q0, half), kLowBits);
    const __m512i high1 = _mm512_srai_epi32(_mm512_add_epi32(q1, half), kLowBits);
    store_bytes(out.high, high0, high1);
    store_bytes(out.low, _mm512_sub_epi32(q0, _mm512_slli_epi32(high0, kLowBits)),
                _mm512_sub_epi32(q1, _mm512_slli_epi32(high1, kLowBits)));
    out.scale = scale;
    out.code_sum[0] = _mm512_reduce_add_epi32(q0);
    out.code_sum[1] = _mm512_reduce_add_epi32(q1);
    out.sum = scale * static_cast<float>(out.code_sum[0] + out.code_sum[1]);
  }
}

template <int M, int kFormat>
void DirectRows::multiply_format(const uint8_t* block, const Block* rows, __m512* acc) const {
  for (int b = 0; b < blocks_; ++b, block += block_bytes(kFormat)) {
    prefetch_ahead(block, kFormat);
    __m512i quads[kQuads];
    load_codes<kFormat>(block, quads);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kFormat));
    const __m512 s = load_half16(scales);
    auto row = [&](int m) -> const Block& { return rows[static_cast<size_t>(m) * blocks_ + b]; };
    auto add_scaled = [&](const __m512i* sums, __m512 s) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(row(m).scale));
        acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m]), scale, acc[m]);
      }
    };
    __m512i sums[M];
    int shifts[M];
    if constexpr (kFormat == kQ8x2) {
      for (int m = 0; m < M; ++m) shifts[m] = 128 * row(m).code_sum[0];
      dot<M, 0, 4>(quads, row, shifts, sums);
      add_scaled(sums, s);
      for (int m = 0; m < M; ++m) shifts[m] = 128 * row(m).code_sum[1];
      dot<M, 4, 8>(quads, row, shifts, sums);
      add_scaled(sums, load_half16(scales + kGroup));
    } else {
      for (int m = 0; m < M; ++m) shifts[m] = offset(kFormat) * (row(m).code_sum[0] + row(m).code_sum[1]);
      dot<M, 0, 8>(quads, row, shifts, sums);
      add_scaled(sums, s);
    }
    if constexpr (kFormat == kQ4) {
      const __m512 minima = load_half16(scales + kGroup);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[m] = _mm512_fmadd_ps(minima, _mm512_set1_ps(row(m).sum), acc[m]);
    }
  }
}

template <int M>
void DirectRows::multiply_rows(const Matrix& weight, int group, const Block* rows, float* y, int stride) const {
  __m512 acc[M];
  for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
  const uint8_t* data = weight.group(group);
  switch (weight.format) {
    case kQ8: multiply_format<M, kQ8>(data, rows, acc); break;
    case kQ8x2: multiply_format<M, kQ8x2>(data, rows, acc); break;
    case kQ5: multiply_format<M, kQ5>(data, rows, acc); break;
    default: multiply_format<M, kQ4>(data, rows, acc); break;
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(y + static_cast<size_t>(m) * stride, acc[m]);
}

void DirectRows::multiply(const Matrix& weight, int group, int first, int count, float* y, int stride) const {
  const Block* rows = data_.data() + static_cast<size_t>(first) * blocks_;
  switch (count) {
    case 1: multiply_rows<1>(weight, group, rows, y, stride); break;
    case 2: multiply_rows<2>(weight, group, rows, y, stride); break;
    case 3: multiply_rows<3>(weight, group, rows, y, stride); break;
    case 4: multiply_rows<4>(weight, group, rows, y, stride); break;
    case 5: multiply_rows<5>(weight, group, rows, y, stride); break;
    case 6: multiply_rows<6>(weight, group, rows, y, stride); break;
    case 7: multiply_rows<7>(weight, group, rows, y, stride); break;
    case 8: multiply_rows<8>(weight, group, rows, y, stride); break;
    case 9: multiply_rows<9>(weight, group, rows, y, stride); break;
    case 10: multiply_rows<10>(weight, group, rows, y, stride); break;
    case 11: multiply_rows<11>(weight, group, rows, y, stride); break;
    default: multiply_rows<12>(weight, group, rows, y, stride); break;
  }
}

}  // namespace evospec

// Sixteen lanes in two AVX2 registers; simd.h tells the operations.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

namespace evospec {

using bf16 = uint16_t;
using Mask = uint16_t;

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
// There is no bf16 arithmetic: pairs are taken apart into float32 as they are loaded.
struct Pairs {
  Floats first, second;
};
struct OnePair {
  __m256 first, second;
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Ints all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Ints plus(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints numbered_from(int32_t first) {
  const Ints lane = {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)};
  return plus(lane, all(first));
}

// ---- masks: a bit a lane, as AVX-512 has them, or all bits of each lane ----

inline __m256i to_lanes8(unsigned bits) {
  const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
}
inline Ints to_lanes(Mask lanes) { return {to_lanes8(lanes), to_lanes8(lanes >> 8)}; }
inline Mask to_mask(__m256 low, __m256 high) {
  return static_cast<Mask>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}

// ---- memory ----

inline const __m256i* vector_at(const void* in) { return static_cast<const __m256i*>(in); }
inline Floats load(const float* in) { return {_mm256_loadu_ps(in), _mm256_loadu_ps(in + 8)}; }
inline Ints load(const int32_t* in) {
  return {_mm256_loadu_si256(vector_at(in)), _mm256_loadu_si256(vector_at(in + 8))};
}
inline Floats load_lanes(Mask lanes, const float* in) {
  if (lanes == 0xFFFF) return load(in);
  const Ints wanted = to_lanes(lanes);
  return {_mm256_maskload_ps(in, wanted.low), _mm256_maskload_ps(in + 8, wanted.high)};
}
inline Ints load_lanes(Mask lanes, const int32_t* in) {
  if (lanes == 0xFFFF) return load(in);
  const Ints wanted = to_lanes(lanes);
  return {_mm256_maskload_epi32(in, wanted.low), _mm256_maskload_epi32(in + 8, wanted.high)};
}
inline void store(float* out, Floats x) {
  _mm256_storeu_ps(out, x.low);
  _mm256_storeu_ps(out + 8, x.high);
}
inline void store(int32_t* out, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), x.high);
}
inline void store_lanes(float* out, Mask lanes, Floats x) {
  if (lanes == 0xFFFF) return store(out, x);
  const Ints wanted = to_lanes(lanes);
  _mm256_maskstore_ps(out, wanted.low, x.low);
  _mm256_maskstore_ps(out + 8, wanted.high, x.high);
}
inline __m256 load_bf16x8(const bf16* in) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats load_bf16(const bf16* in) { return {load_bf16x8(in), load_bf16x8(in + 8)}; }
inline __m256i upper_halves(__m256 x) {  // rounded to nearest even; a NaN stays one
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC0), nan);
}
inline void store_bf16(bf16* out, Floats x) {
  const __m256i packed = _mm256_packus_epi32(upper_halves(x.low), upper_halves(x.high));  // of each 128 bits in turn
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline __m256 load_half8(const uint16_t* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
inline Floats load_half(const uint16_t* in) { return {load_half8(in), load_half8(in + 8)}; }

// ---- arithmetic ----

inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats subtract_product(Floats c, Floats a, Floats b) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats rounded(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
inline __m256 power_of_two(__m256 whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Floats times_power_of_two(Floats x, Floats whole) {
  return x * Floats{power_of_two(whole.low), power_of_two(whole.high)};
}
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Ints minus(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints times(Ints a, Ints b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
inline Ints exclusive_or(Ints a, Ints b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
template <int kBits>
inline Ints shift_left(Ints x) {
  return {_mm256_slli_epi32(x.low, kBits), _mm256_slli_epi32(x.high, kBits)};
}
template <int kBits>
inline Ints shift_right(Ints x) {
  return {_mm256_srli_epi32(x.low, kBits), _mm256_srli_epi32(x.high, kBits)};
}
inline int32_t sum(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Floats unsigned_to_floats(Ints x) {
  // Both halves are exact, so that only their sum is rounded: as if converted at once.
  const Ints upper = shift_right<16>(x), lower = minus(x, shift_left<16>(upper));
  return multiply_add(to_floats(upper), all(65536.0f), to_floats(lower));
}
inline Ints bits_of(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

// ---- lanes ----

template <int kComparison>
inline Mask compare(Floats a, Floats b) {
  return to_mask(_mm256_cmp_ps(a.low, b.low, kComparison), _mm256_cmp_ps(a.high, b.high, kComparison));
}
inline Mask less(Floats a, Floats b) { return compare<_CMP_LT_OQ>(a, b); }
inline Mask more(Floats a, Floats b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask at_least(Floats a, Floats b) { return compare<_CMP_GE_OQ>(a, b); }
inline Mask not_less(Floats a, Floats b) { return compare<_CMP_NLT_UQ>(a, b); }
inline Mask equal(Floats a, Floats b) { return compare<_CMP_EQ_OQ>(a, b); }
inline Mask less(Ints a, Ints b) {
  const __m256i low = _mm256_cmpgt_epi32(b.low, a.low), high = _mm256_cmpgt_epi32(b.high, a.high);
  return to_mask(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}
inline Ints choose(Mask lanes, Ints yes, Ints no) {
  const Ints wanted = to_lanes(lanes);
  return {_mm256_blendv_epi8(no.low, yes.low, wanted.low), _mm256_blendv_epi8(no.high, yes.high, wanted.high)};
}
inline Floats choose(Mask lanes, Floats yes, Floats no) {
  const Ints chosen = choose(lanes, bits_of(yes), bits_of(no));
  return {_mm256_castsi256_ps(chosen.low), _mm256_castsi256_ps(chosen.high)};
}
inline int32_t smallest(Mask lanes, Ints x) {
  x = choose(lanes, x, all(INT32_MAX));
  const __m256i eight = _mm256_min_epi32(x.low, x.high);
  __m128i four = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_min_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

// For each set of 8 lanes: the lanes in it, in order, then zeros.
constexpr auto kPackedOrder = [] {
  std::array<std::array<uint8_t, 8>, 256> order{};
  for (unsigned lanes = 0; lanes < 256; ++lanes) {
    for (uint8_t lane = 0, place = 0; lane < 8; ++lane) {
      if (lanes >> lane & 1) order[lanes][place++] = lane;
    }
  }
  return order;
}();
inline __m256i packed_order(unsigned lanes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPackedOrder[lanes].data())));
}
inline void store_packed(int32_t* out, Mask lanes, Ints x) {
  const unsigned low = lanes & 255u, high = lanes >> 8;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(x.low, packed_order(low)));
  out += __builtin_popcount(low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(x.high, packed_order(high)));
}
inline void store_packed(float* out, Mask lanes, Floats x) {
  store_packed(reinterpret_cast<int32_t*>(out), lanes, bits_of(x));
}

// ---- pairs ----

inline __m256 first_of_pairs(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of_pairs(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline Pairs load_pairs(const bf16* in) {
  const __m256i low = _mm256_loadu_si256(vector_at(in)), high = _mm256_loadu_si256(vector_at(in + 16));
  return {{first_of_pairs(low), first_of_pairs(high)}, {second_of_pairs(low), second_of_pairs(high)}};
}
inline OnePair broadcast_pair(const bf16* in) {
  int32_t pair;
  __builtin_memcpy(&pair, in, 4);
  const __m256i pairs = _mm256_set1_epi32(pair);
  return {first_of_pairs(pairs), second_of_pairs(pairs)};
}
inline Floats add_products(Floats sums, Pairs a, Pairs b) {
  return multiply_add(a.second, b.second, multiply_add(a.first, b.first, sums));
}
inline Floats add_products(Floats sums, Pairs a, OnePair b) {
  return add_products(sums, a, Pairs{{b.first, b.first}, {b.second, b.second}});
}

class DoubleSum {
 public:
  void add(Floats values) {
    add_four(sums_[0], _mm256_castps256_ps128(values.low));
    add_four(sums_[1], _mm256_extractf128_ps(values.low, 1));
    add_four(sums_[2], _mm256_castps256_ps128(values.high));
    add_four(sums_[3], _mm256_extractf128_ps(values.high, 1));
  }
  double total() const {
    // Low half plus high half first, as with AVX-512.
    const __m256d four = _mm256_add_pd(_mm256_add_pd(sums_[0], sums_[2]), _mm256_add_pd(sums_[1], sums_[3]));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

 private:
  static void add_four(__m256d& sums, __m128 values) { sums = _mm256_add_pd(sums, _mm256_cvtps_pd(values)); }

  __m256d sums_[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
};

}  // namespace evospec

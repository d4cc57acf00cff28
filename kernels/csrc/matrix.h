// Weight matrices packed for AVX-512 and AMX, in the precision they have in the file.
//
// y[n] = sum_k w[n][k] x[k]. Columns of the packed form are rows n of the weight, in groups of 16. For each group
// the blocks of 32 k follow each other, so that a product reads memory strictly forward.
//
// A block of codes is eight "quad rows" R of 64 codes: position p is the code of column p / 4 at k = 4R + p % 4, so a
// 32-bit lane belongs to one column: the operand of vpdpbusd. Codes are unsigned. kBf16 has 16 "pair rows" of 32
// values instead, position p being column p / 2 at k = 2r + p % 2: an AMX tile as it is.
//
//   format   codes                                                  scales (half precision)        bytes / 512 weights
//   kBf16    32 bf16 per pair row                                   none                           1024
//   kQ8      64 bytes per quad row                                  16                             544  w = s (q - 128)
//   kQ8x2    the same                                               16 for k < 16, 16 for the rest 576  w = s (q - 128)
//   kQ5      nibbles as kQ4; then 16 words, bit k the fifth of k    16                             352  w = s (q - 16)
//   kQ4      64 bytes per two quad rows: 2j low, 2j + 1 high nibble 16, then 16 minima             320  w = s q + m
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace evospec {

constexpr int kGroup = 16;   // columns
constexpr int kBlock = 32;   // k
constexpr int kQuads = 8;    // quad rows of a block of codes
constexpr int kPairs = 16;   // pair rows of a bf16 block

enum Format : int { kBf16 = 0, kQ8 = 1, kQ8x2 = 2, kQ5 = 3, kQ4 = 4 };

inline size_t code_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 512, 512, 320, 256};
  return kBytes[format];
}

inline size_t block_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 544, 576, 352, 320};
  return kBytes[format];
}

struct Matrix {
  int format = kBf16;
  int n = 0;  // rows of the weight; storage is padded to whole pairs of groups
  int k = 0;  // a multiple of 32
  const uint8_t* data = nullptr;
  const float* bias = nullptr;  // [n padded to 32] or null

  int num_blocks() const { return k / kBlock; }
  size_t group_bytes() const { return num_blocks() * block_bytes(format); }
  const uint8_t* group(int g) const { return data + g * group_bytes(); }
};

// One weight row (k values) as codes; w = scale * code + minimum. `scales` has one entry per 16 k.
struct RowCodes {
  int format;
  uint8_t* codes;  // [k], as the formats above have them
  float* scales;   // [k / 16]
  float* minima;   // [k / 32], kQ4 only
};

// Weights are asked for this many bytes before they are read: the hardware's own prefetcher does not run far enough
// ahead of a stream that is also computed on, and half of the time was waiting (docs/decisions/001-cpu-kernels.md).
constexpr size_t kPrefetchBytes = 2048;

inline void prefetch_ahead(const uint8_t* block, int format) {
  prefetch(block + kPrefetchBytes, block_bytes(format));
}

// Writes row `row` into the packed matrix at `data`.
void pack_codes(uint8_t* data, int k, int row, const RowCodes& codes);
void pack_floats(uint8_t* data, int k, int row, const float* values);

// Row `row` of the weight as floats: an embedding lookup.
void unpack_row(const Matrix& matrix, int row, float* out);

// Expands blocks first .. first + count - 1 of a group to bf16 tiles: out[count][16][32].
void expand_blocks(const Matrix& matrix, int group, int first, int count, bf16* out);

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

}  // namespace evospec

// Weight matrices packed for vectors and AMX tiles, in the precision they have in the file.
//
// y[n] = sum_k w[n][k] x[k]. Columns of the packed form are rows n of the weight, in groups of 16. A block is 32 k of
// one group. For each pair of groups the blocks of both follow each other in turn, so that a product with a pair reads
// memory strictly forward.
//
// A block of codes is eight "quad rows" R of 64 codes: position p is the code of column p / 4 at k = 4R + p % 4, so a
// 32-bit lane belongs to one column: the operand of vpdpbusd. Codes are unsigned. kBf16 has 16 "pair rows" of 32
// values instead, position p being column p / 2 at k = 2r + p % 2: an AMX tile as it is.
//
//   format   codes                                                  scales (half precision)        bytes / 512 weights
//   kBf16    32 bf16 per pair row                                   none                           1024
//   kQ8      64 bytes per quad row                                  16                             544  w = s (q - 128)
//   kQ6      64 bytes per quad row, six bits of each used           16 for k < 16, 16 for the rest 576  w = s (q - 32)
//   kQ5      nibbles as kQ4; then a word a column of fifth bits      16                             352  w = s (q - 16)
//   kQ4      64 bytes per two quad rows: 2j low, 2j + 1 high nibble 16, then 16 minima             320  w = s q + m
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace evospec {

constexpr int kGroup = 16;                // columns
constexpr int kPairColumns = 2 * kGroup;  // of a pair of groups
constexpr int kBlock = 32;                // k
constexpr int kQuads = 8;                 // quad rows of a block of codes
constexpr int kPairs = 16;                // pair rows of a bf16 block

enum Format : int { kBf16 = 0, kQ8 = 1, kQ6 = 2, kQ5 = 3, kQ4 = 4 };

constexpr bool has_whole_bytes(int format) { return format == kQ8 || format == kQ6; }

// A code less this is the number that its scale multiplies.
constexpr int code_offset(int format) {
  constexpr int kOffsets[] = {0, 128, 32, 16, 0};
  return kOffsets[format];
}

constexpr size_t code_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 512, 512, 320, 256};
  return kBytes[format];
}

constexpr size_t block_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 544, 576, 352, 320};
  return kBytes[format];
}

struct Matrix {
  int format;
  int n;       // rows of the weight; storage is padded to whole pairs of groups
  int k;       // a multiple of 32
  int digits;  // of activations that are multiplied with codes as they are, where the format takes_one_digit (direct.h)
  const uint8_t* data;
  const float* bias;  // [n padded to 32] or null

  int num_blocks() const { return k / kBlock; }
  int num_pairs() const { return (n + kPairColumns - 1) / kPairColumns; }
  size_t pair_bytes() const { return 2 * num_blocks() * block_bytes(format); }
  const uint8_t* pair(int p) const { return data + p * pair_bytes(); }
};

// One weight row (k values) as codes; w = scale * code + minimum. `scales` has one entry per 16 k.
struct RowCodes {
  int format;
  uint8_t* codes;  // [k], as the formats above have them
  float* scales;   // [k / 16]
  float* minima;   // [k / 32], kQ4 only
};

bool is_intel();  // whether the processor is of Intel

// What a thread reads after the blocks at hand: up to `end`, and then from `next` on (null: nobody knows).
struct ReadAhead {
  const uint8_t* end;
  const uint8_t* next;

  // Asks for the `bytes` that lie some kilobytes behind `at`: the hardware's own prefetcher does not run far enough ahead of
  // a stream that is also computed on (docs/decisions/004-integer-products.md).
  void prefetch_behind(const uint8_t* at, size_t bytes) const {
    at += kDistance;
    if (at < end) return prefetch_stream(at, bytes);
    if (next != nullptr) prefetch<_MM_HINT_T1>(next + (at - end), bytes);
  }

  // The first kilobytes of a stream.
  void prefetch_first(const uint8_t* begin) const {
    prefetch_stream(begin, std::min<size_t>(kDistance, std::max<ptrdiff_t>(end - begin, 0)));
  }

 private:
  static const size_t kDistance;
  static const bool kToFirstLevel;  // else to the second: see matrix.cpp

  static void prefetch_stream(const uint8_t* at, size_t bytes) {
    if (kToFirstLevel) {
      prefetch<_MM_HINT_NTA>(at, bytes);
    } else {
      prefetch<_MM_HINT_T1>(at, bytes);
    }
  }
};

// Which bit of a column's word is the fifth of k = kk. With AVX2 the four codes of a quad row have theirs 8 bits apart:
// one shift moves all into place, whether they are multiplied as bytes or as pairs of 16 bits (0 and 2, 1 and 3).
inline int fifth_bit([[maybe_unused]] int kk) {
#ifdef __AVX512F__
  return kk;
#else
  return kk % 4 * 8 + kk / 4;
#endif
}

// Writes row `row` into the packed matrix at `data`, which starts as zeros.
void pack_codes(uint8_t* data, int k, int row, const RowCodes& codes);

// Row `row` of the weight as floats: an embedding lookup.
void unpack_row(const Matrix& matrix, int row, float* out);

}  // namespace evospec

// Weight matrices packed for AMX and AVX-512, in the precision they have in the file.
//
// y[n] = sum_k w[n][k] x[k]. Columns of the packed form are rows n of the weight, in groups of 16. For each group
// the blocks of 32 k follow each other, so that a product reads memory strictly forward. A block holds 16 "pair
// rows" r of 32 codes: position p is the weight of column p / 2 at k = 2r + p % 2, which is the layout of an AMX
// bf16 B tile (and of vdpbf16ps with one column a lane).
//
//   format   codes                                       scales (half precision)       bytes per 512 weights
//   kBf16    32 bf16 per pair row                        none                          1024
//   kQ8      32 int8 per pair row                        16                            544
//   kQ8x2    32 int8 per pair row                        16 for k < 16, 16 for the rest 576
//   kQ5      16-bit lane p: codes of pair rows 3j..3j+2  16                            416   w = s (q - 16)
//   kQ4      16-bit lane p: codes of pair rows 4j..4j+3  16, then 16 minima            320   w = s q + m
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace evospec {

constexpr int kGroup = 16;   // columns
constexpr int kBlock = 32;   // k
constexpr int kPairs = 16;   // pair rows of a block

enum Format : int { kBf16 = 0, kQ8 = 1, kQ8x2 = 2, kQ5 = 3, kQ4 = 4 };

inline size_t code_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 512, 512, 384, 256};
  return kBytes[format];
}

inline size_t block_bytes(int format) {
  constexpr size_t kBytes[] = {1024, 544, 576, 416, 320};
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
  int8_t* codes;   // [k], unsigned codes for kQ4 and kQ5
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

// Expands one group (16 columns, all k) to bf16 tiles: out[num_blocks][16][32].
void expand_group(const Matrix& matrix, int group, bf16* out);

}  // namespace evospec

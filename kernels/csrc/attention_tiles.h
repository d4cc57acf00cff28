// Attention of up to 16 query rows by AMX tiles. A cache block is laid out as tiles already.
#pragma once

#include "attention.h"
#include "tiles.h"

namespace evospec {

constexpr int kLanes = 16;     // keys scored at a time
constexpr int kMaxRows = 16;   // query rows (query x head of one group) that share a read of the keys
constexpr int kSegment = 512;  // keys between two rescalings of the running softmax

// One head's values of a segment's blocks, from dimension `first` on.
struct Values {
  const KvCache& cache;
  const int32_t* blocks;
  int head;
  int first;
};

// Before and after: `release_tiles` gives them back.
void configure_attention_tiles();

// scores [kMaxRows][kSegment], the first 16 of each row: of 16 keys for all rows of q [kMaxRows][head_dim].
// keys: [head_dim / 2][stride][2], already at the first of the 16.
void score_key_tiles(const bf16* q, const bf16* keys, int stride, int head_dim, float* scores);

// sums [kMaxRows][head_dim], from values.first on, += weights [kMaxRows][kSegment] . values, for 64 dimensions where
// `four`, else 32.
void add_value_tiles(bool four, const bf16* weights, const Values& values, int count, float* sums);

}  // namespace evospec

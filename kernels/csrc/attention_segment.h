// What the keys of one segment give up to 16 query rows.
#pragma once

#include "attention_tiles.h"

namespace evospec {

// So many rows at a time by vector instructions.
#ifdef __AVX512F__
constexpr int kVectorRows = 7;
#else
constexpr int kVectorRows = 4;
#endif

// Query rows of one sequence and one KV head: up to kMaxRows where there is AMX, else up to kVectorRows.
struct Rows {
  int count;
  const bf16* q[kMaxRows];
  bf16* out[kMaxRows];
  int first[kMaxRows];  // the first key this row may see, and
  int limit[kMaxRows];  // the first after that which it may not; both ascend with the rows
  float sink[kMaxRows];  // score, to base 2, of a key whose value is zero; -inf: there is none

  int context() const { return limit[count - 1]; }
  int first_segment() const { return first[0] / kSegment; }
};

// What some keys give each row: their weights' sum, and the sum of their values by weight, in units of the weight of a key with
// the largest score. -inf: they give nothing.
struct Attended {
  float* sums;  // [kMaxRows][head_dim]
  float *largest, *total;

  Attended(float* memory, int dim) : sums(memory), largest(memory + kMaxRows * dim), total(largest + kMaxRows) {}

  static size_t size(int dim) { return static_cast<size_t>(kMaxRows) * (dim + 2); }
};

// The keys of the segment that begins at `start`. Segments begin at multiples of their length, whatever a row may see, and
// are added up in their order: so a row's bits depend neither on other rows nor on who computes which segment.
void attend_segment(const KvCache& cache, const int32_t* blocks, int head, const Rows& rows, int start,
                    const Attended& out);

}  // namespace evospec

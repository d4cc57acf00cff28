// Low-rank adapters of a batch's rows, each row its own (kernels/batched_lora.py says what is computed).
#pragma once

#include "simd.h"
#include "threads.h"

namespace evospec {

// Adapters of columns start .. start + outputs - 1 of a matrix's product.
struct LoraPart {
  int start, outputs;
  const bf16* a;  // [slots][rank][inputs]
  const bf16* b;  // [slots][outputs][rank]
};

inline constexpr int kMaxLoraParts = 3;

// Adapters of one matrix; num_parts 0: none.
struct LoraMatrix {
  int inputs, num_parts;  // inputs a multiple of 32
  LoraPart parts[kMaxLoraParts];
};

struct LoraRows {
  int rank;
  LoraMatrix qkv, output, down;  // of a layer
  const int32_t* slots;          // of each row; -1: none
};

// Inside Team::run(): `count` rows of out, products of a matrix that are `stride` apart, gain what their adapters of it
// make of x [count][inputs]. inner has room for [count][num_parts][rank]. Ends with a barrier.
void add_lora(Team& team, const LoraRows& rows, const LoraMatrix& matrix, const bf16* x, int count, int stride,
              float* inner, float* out);

}  // namespace evospec

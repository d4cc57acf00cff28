// Low-rank adapters of a batch's rows, each row its own (kernels/batched_lora.py says what is computed).
#pragma once

#include "simd.h"

namespace evospec {

// Adapters of columns start .. start + outputs - 1 of a matrix's product.
struct LoraPart {
  int start, outputs;
  const bf16* a;  // [slots][rank][inputs]
  const bf16* b;  // [slots][outputs][rank]
};

// Adapters of one matrix; num_parts 0: none.
struct LoraMatrix {
  int inputs, num_parts;  // inputs a multiple of 32
  LoraPart parts[3];
};

struct LoraRows {
  int rank;                      // up to kMaxLoraRank
  LoraMatrix qkv, output, down;  // of a layer
  const int32_t* slots;          // of each row; -1: none
};

inline constexpr int kMaxLoraRank = 256;

// out, the row's product of a matrix, gains what the row's adapter of that matrix makes of x.
void add_lora(const LoraRows& rows, const LoraMatrix& matrix, int row, const bf16* x, float* out);

}  // namespace evospec

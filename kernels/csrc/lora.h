// Low-rank adapters of a batch's rows, each row its own (kernels/batched_lora.py says what is computed).
#pragma once

#include "simd.h"

namespace evospec {

// Adapters of columns start .. start + outputs - 1 of a product.
struct LoraPart {
  int start, outputs;
  const bf16* a;  // [slots][rank][inputs]
  const bf16* b;  // [slots][outputs][rank]
};

struct LoraRows {
  int rank, inputs, num_parts;  // rank up to kMaxLoraRank, inputs a multiple of 32
  LoraPart parts[3];
  const int32_t* slots;  // of each row; -1: none
};

inline constexpr int kMaxLoraRank = 256;

// out, the row's product, gains what the row's adapter makes of x.
void add_lora(const LoraRows& rows, int row, const bf16* x, float* out);

}  // namespace evospec

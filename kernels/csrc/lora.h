// Low-rank adapters of a batch's rows, each row its own (kernels/batched_lora.py says what is computed).
#pragma once

#include "simd.h"
#include "threads.h"

namespace evospec {

// Adapters of columns start .. start + outputs - 1 of a matrix's product; outputs is a multiple of 16.
struct LoraPart {
  int start, outputs;
  const bf16* a;  // [slots][rank][inputs]
  const bf16* b;  // [slots][rank][outputs]
};

// Adapters of one matrix; num_parts 0: none.
struct LoraMatrix {
  int inputs, num_parts;  // inputs a multiple of 32
  LoraPart parts[3];
};

struct LoraRows {
  int rank;
  LoraMatrix qkv, output, down;  // of a layer
  const int32_t* slots;          // of each row; -1: none
};

// out [count][stride], a matrix's product of x [count][inputs], gains what each row's adapter of that matrix makes of x.
// Inside Team::run, by all threads, after a barrier; ends with one. sums: room for [count][rank], shared.
void add_lora(Team& team, const LoraRows& rows, const LoraMatrix& matrix, const bf16* x, int count, float* sums,
              int stride, float* out);

}  // namespace evospec

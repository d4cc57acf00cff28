// y = x W^T for a ragged batch of bf16 rows, with the work that follows fused in.
#pragma once

#include "matrix.h"
#include "threads.h"

namespace evospec {

enum class Epilogue {
  kStore,    // out[m][n] = y + bias                                   float, row stride `stride`
  kAdd,      // out[m][n] += y + bias                                  float: the residual stream
  kSiluMul,  // out[m][n / 2] = silu(gate) * up, in bf16; W's groups alternate gate, up
  kGeluMul,  // the same with gelu(gate)
};

struct Linear {
  const Matrix* weight;
  const bf16* x;  // [rows padded to 16][k]; padding rows may hold anything finite
  int rows;
  Epilogue epilogue;
  void* out;
  int stride;  // of out, in elements
};

// Up to so many rows of two digits are multiplied with codes as they are (direct.h); more are faster by AMX's tiles, where
// there are any. Rows of one digit are never expanded.
extern "C" int evo_max_direct_rows();

// Inside Team::run, by all threads; ends without a barrier.
void linear(Team& team, const Linear& op);

}  // namespace evospec

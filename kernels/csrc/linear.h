// y = x W^T for a ragged batch of bf16 rows, with the work that follows fused in.
#pragma once

#include "matrix.h"
#include "threads.h"

namespace evospec {

enum class Epilogue {
  kStore,    // out[m][n] = y + bias                                   float, row stride `stride`
  kAdd,      // out[m][n] += y + bias                                  float: the residual stream
  kSiluMul,  // out[m][n / 2] = silu(gate) * up, both + bias, in bf16; W's groups alternate gate, up
  kGeluMul,  // the same with gelu(gate)
  kSwigluOai,  // the same with what gpt-oss has
};

constexpr bool is_gated(Epilogue epilogue) { return epilogue >= Epilogue::kSiluMul; }

struct alignas(64) CacheLine {
  uint8_t bytes[64];
};

struct Linear {
  const Matrix* weight;
  const bf16* x;  // [rows padded to 16][k]; padding rows may hold anything finite
  int rows;
  Epilogue epilogue;
  void* out;
  int stride;  // of out, in elements
  // The first rows are multiplied with codes as they are (direct.h), those behind them by AMX's bf16 tiles, where there are
  // any: from a dozen rows on these are faster, but they round otherwise, so no row may go now this way and now that.
  int num_direct;
  const Matrix* next = nullptr;  // what is multiplied after it; null: nobody knows
  // [rows][k / 16]: where the threads together make the integers of many rows; null: each thread makes its own.
  CacheLine* room = nullptr;

  Linear first(int count) const;   // of these rows
  Linear behind(int count) const;  // of the others
};

// Inside Team::run, by all threads; ends without a barrier.
void linear(Team& team, const Linear& op);

// What it makes of one row and the 32 columns of a pair of groups, by the calling thread alone.
void linear_pair(const Linear& op, int row, int pair);

}  // namespace evospec

#include "lora.h"

namespace evospec {

namespace {

float dot(const bf16* a, const bf16* b, int size) {
  Floats sums = all(0.0f);
  for (int i = 0; i < size; i += 32) sums = add_products(sums, load_pairs(a + i), load_pairs(b + i));
  return sum(sums);
}

// A bf16 row with floats, of any size.
float dot(const bf16* a, const float* b, int size) {
  Floats sums = all(0.0f);
  int i = 0;
  for (; i + 16 <= size; i += 16) sums = multiply_add(load_bf16(a + i), load(b + i), sums);
  float rest = 0;
  for (; i < size; ++i) rest += to_float(a[i]) * b[i];
  return sum(sums) + rest;
}

}  // namespace

void add_lora(const LoraRows& rows, const LoraMatrix& matrix, int row, const bf16* x, float* out) {
  const int slot = rows.slots[row], rank = rows.rank, inputs = matrix.inputs;
  if (slot < 0) return;
  float inner[kMaxLoraRank];
  for (int p = 0; p < matrix.num_parts; ++p) {
    const LoraPart& part = matrix.parts[p];
    const bf16* a = part.a + static_cast<size_t>(slot) * rank * inputs;
    const bf16* b = part.b + static_cast<size_t>(slot) * part.outputs * rank;
    for (int r = 0; r < rank; ++r) inner[r] = dot(a + static_cast<size_t>(r) * inputs, x, inputs);
    for (int n = 0; n < part.outputs; ++n) out[part.start + n] += dot(b + static_cast<size_t>(n) * rank, inner, rank);
  }
}

}  // namespace evospec

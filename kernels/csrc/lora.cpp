#include "lora.h"

#include <algorithm>

namespace evospec {

namespace {

// Of a and b, so that all threads have something to do, and rows of one adapter find its weights in a near cache.
constexpr int kRanksAtOnce = 8, kOutputsAtOnce = 128;

int num_blocks(int size, int block) { return (size + block - 1) / block; }

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

void add_lora(Team& team, const LoraRows& rows, const LoraMatrix& matrix, const bf16* x, int count, int stride,
              float* inner, float* out) {
  const int rank = rows.rank, inputs = matrix.inputs, parts = matrix.num_parts, blocks = num_blocks(rank, kRanksAtOnce);
  if (parts == 0) return;
  team.work(count * parts * blocks, [&](int item) {
    const int row = item % count, block = item / count, p = block / blocks, first = block % blocks * kRanksAtOnce;
    if (rows.slots[row] < 0) return;
    const bf16* a = matrix.parts[p].a + static_cast<size_t>(rows.slots[row]) * rank * inputs;
    float* projected = inner + (static_cast<size_t>(row) * parts + p) * rank;
    for (int r = first; r < std::min(first + kRanksAtOnce, rank); ++r) {
      projected[r] = dot(a + static_cast<size_t>(r) * inputs, x + static_cast<size_t>(row) * inputs, inputs);
    }
  });
  team.barrier();
  for (int p = 0; p < parts; ++p) {
    const LoraPart& part = matrix.parts[p];
    team.work(count * num_blocks(part.outputs, kOutputsAtOnce), [&](int item) {
      const int row = item % count, first = item / count * kOutputsAtOnce;
      if (rows.slots[row] < 0) return;
      const bf16* b = part.b + static_cast<size_t>(rows.slots[row]) * part.outputs * rank;
      const float* projected = inner + (static_cast<size_t>(row) * parts + p) * rank;
      float* gains = out + static_cast<size_t>(row) * stride + part.start;
      for (int n = first; n < std::min(first + kOutputsAtOnce, part.outputs); ++n) {
        gains[n] += dot(b + static_cast<size_t>(n) * rank, projected, rank);
      }
    });
    team.barrier();
  }
}

}  // namespace evospec

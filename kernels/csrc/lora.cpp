#include "lora.h"

#include <algorithm>
#include <span>

namespace evospec {

namespace {

constexpr int kRanks = 8;     // sums at once: x is loaded once for them, and none waits for another
constexpr int kColumns = 64;  // of b at once
constexpr int kVectors = kColumns / 16;

int num_blocks(int size, int block) { return (size + block - 1) / block; }

// sums[i] = row i of a [kCount][size] times x
template <int kCount>
void multiply_rows(const bf16* a, const bf16* x, int size, float* sums) {
  Floats acc[kCount];
  std::fill(acc, acc + kCount, all(0.0f));
  for (int k = 0; k < size; k += 32) {
    const Pairs of_x = load_pairs(x + k);
    for (int i = 0; i < kCount; ++i) acc[i] = add_products(acc[i], load_pairs(a + static_cast<size_t>(i) * size + k), of_x);
  }
  for (int i = 0; i < kCount; ++i) sums[i] = sum(acc[i]);
}

// out [kCount * 16] += sums [rank] times columns of b [rank][outputs]
template <int kCount>
void add_columns(const bf16* b, const float* sums, int rank, int outputs, float* out) {
  Floats acc[kCount];
  for (int v = 0; v < kCount; ++v) acc[v] = load(out + v * 16);
  for (int r = 0; r < rank; ++r) {
    const Floats factor = all(sums[r]);
    for (int v = 0; v < kCount; ++v) {
      acc[v] = multiply_add(factor, load_bf16(b + static_cast<size_t>(r) * outputs + v * 16), acc[v]);
    }
  }
  for (int v = 0; v < kCount; ++v) store(out + v * 16, acc[v]);
}

void multiply_block(const bf16* a, const bf16* x, int count, int size, float* sums) {
  if (count == kRanks) return multiply_rows<kRanks>(a, x, size, sums);
  for (int i = 0; i < count; ++i) multiply_rows<1>(a + static_cast<size_t>(i) * size, x, size, sums + i);
}

void add_block(const bf16* b, const float* sums, int count, int rank, int outputs, float* out) {
  if (count == kColumns) return add_columns<kVectors>(b, sums, rank, outputs, out);
  for (int i = 0; i < count; i += 16) add_columns<1>(b + i, sums, rank, outputs, out + i);
}

}  // namespace

// Rows come first in the order of work: those that share an adapter read a block of it from the cache.
void add_lora(Team& team, const LoraRows& rows, const LoraMatrix& matrix, const bf16* x, int count, float* sums,
              int stride, float* out) {
  const int rank = rows.rank, inputs = matrix.inputs;
  for (const LoraPart& part : std::span(matrix.parts, matrix.num_parts)) {
    team.work(num_blocks(rank, kRanks) * count, [&](int item) {
      const int row = item % count, first = item / count * kRanks, slot = rows.slots[row];
      if (slot < 0) return;
      const bf16* a = part.a + (static_cast<size_t>(slot) * rank + first) * inputs;
      multiply_block(a, x + static_cast<size_t>(row) * inputs, std::min(kRanks, rank - first), inputs,
                     sums + static_cast<size_t>(row) * rank + first);
    });
    team.barrier();
    team.work(num_blocks(part.outputs, kColumns) * count, [&](int item) {
      const int row = item % count, first = item / count * kColumns, slot = rows.slots[row];
      if (slot < 0) return;
      const bf16* b = part.b + static_cast<size_t>(slot) * rank * part.outputs + first;
      add_block(b, sums + static_cast<size_t>(row) * rank, std::min(kColumns, part.outputs - first), rank,
                part.outputs, out + static_cast<size_t>(row) * stride + part.start + first);
    });
    team.barrier();
  }
}

}  // namespace evospec

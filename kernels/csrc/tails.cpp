#include "tails.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "topk.h"

namespace evospec {

namespace {

constexpr int kSlotsAtOnce = 16;  // one vector of logits
constexpr int kRowsAtOnce = 8;    // independent sums: one product takes many cycles but starts every cycle
constexpr int kProductsPerElement = 8;  // that cost what a logit costs elsewhere, to tell whether threads are worth it

// Products of neighbouring rows with x; rows beyond the last are computed as the last.
void multiply_rows(const bf16* rows, int last, const bf16* x, int hidden, float* out) {
  const bf16* row[kRowsAtOnce];
  Floats sums[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) {
    row[i] = rows + static_cast<size_t>(std::min(i, last)) * hidden;
    sums[i] = all(0.0f);
  }
  for (int k = 0; k < hidden; k += 32) {
    const Pairs value = load_pairs(x + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) sums[i] = add_products(sums[i], load_pairs(row[i] + k), value);
  }
  for (int i = 0; i < kRowsAtOnce; ++i) out[i] = sum(sums[i]);
}

// Logits of up to 16 slots from `slot` on; -inf where they are empty.
void multiply_slots(const TailSlabs& tails, int slab, int slot, const bf16* x, float* out) {
  const Mask lanes = lanes_from(slot, tails.slots);
  const Ints ids = load_lanes(lanes, tails.ids(slab) + slot);
  const Mask used = static_cast<Mask>(lanes & ~less(ids, all(0)));
  alignas(64) float products[kSlotsAtOnce] = {};
  for (int i = 0; i < kSlotsAtOnce; i += kRowsAtOnce) {
    if ((used >> i & ((1 << kRowsAtOnce) - 1)) == 0) continue;
    multiply_rows(tails.row(slab, slot + i), tails.slots - slot - i - 1, x, tails.hidden, products + i);
  }
  store_lanes(out, lanes, choose(used, load(products), all(-std::numeric_limits<float>::infinity())));
}

// out[i * stride + slot] = the logits of each row's tail.
void tail_logits(Team* team, const TailSlabs& tails, const TailQueries& queries, int count, float* out, size_t stride) {
  const int pieces = (tails.slots + kSlotsAtOnce - 1) / kSlotsAtOnce;
  const size_t elements = static_cast<size_t>(count) * tails.slots * tails.hidden / kProductsPerElement;
  for_each_item(team, count * pieces, elements, [&](int item) {
    const int row = item / pieces, slot = item % pieces * kSlotsAtOnce;
    const bf16* x = queries.hidden + static_cast<size_t>(row) * tails.hidden;
    multiply_slots(tails, queries.slabs[row], slot, x, out + row * stride + slot);
  });
}

}  // namespace

extern "C" void evo_draft_top_k(Team* team, const LogitRows& core, const int32_t* core_ids, const TailSlabs& tails,
                 const TailQueries& queries, int k, float* values, int32_t* token_ids) {
  // The best of the core in order, then the whole tail: small rows, of which the best are taken again.
  const int rows = core.rows, of_core = std::min(k, core.columns), columns = of_core + tails.slots;
  std::vector<float> best(static_cast<size_t>(rows) * of_core), merged(static_cast<size_t>(rows) * columns);
  std::vector<int64_t> best_ids(best.size()), places(static_cast<size_t>(rows) * k);
  evo_top_k(team, core, of_core, core_ids, best.data(), best_ids.data());
  for (int row = 0; row < rows; ++row) {
    std::copy_n(&best[static_cast<size_t>(row) * of_core], of_core, &merged[static_cast<size_t>(row) * columns]);
  }
  tail_logits(team, tails, queries, rows, merged.data() + of_core, columns);
  evo_top_k(team, {merged.data(), static_cast<size_t>(columns), rows, columns, nullptr}, k, nullptr, values, places.data());
  for (size_t i = 0; i < places.size(); ++i) {
    const size_t row = i / k, place = places[i];
    token_ids[i] = place < static_cast<size_t>(of_core)
                       ? static_cast<int32_t>(best_ids[row * of_core + place])
                       : tails.ids(queries.slabs[row])[place - of_core];
  }
}

}  // namespace evospec

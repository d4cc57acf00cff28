// A draft's candidates: the largest logits over rows of the head that all share (the core) and over a few of each
// session's own (its tail).
#pragma once

#include "rows.h"

namespace evospec {

// Slabs of head rows, one a session, each with room for the same number of tokens.
struct TailSlabs {
  const bf16* rows;          // [slabs][slots][hidden]
  const int32_t* token_ids;  // [slabs][slots]; below 0: an empty slot
  int slots;
  int hidden;  // a multiple of 32

  const bf16* row(int slab, int slot) const { return rows + (static_cast<size_t>(slab) * slots + slot) * hidden; }
  const int32_t* ids(int slab) const { return token_ids + static_cast<size_t>(slab) * slots; }
};

// Hidden states, and the slab that each is multiplied with.
struct TailQueries {
  const bf16* hidden;    // [core.rows][tails.hidden]
  const int32_t* slabs;  // [core.rows]
};

// values, token_ids [core.rows][k], k <= core.columns + tails.slots: the k largest logits of each row in descending
// order; of equal ones the core's come first, by column, then the tail's, by slot. Columns of the core stand for the
// tokens core_ids [core.columns], null: 0 .. columns - 1. Empty slots are -inf and keep their id.
extern "C" void evo_draft_top_k(Team* team, const LogitRows& core, const int32_t* core_ids, const TailSlabs& tails,
                 const TailQueries& queries, int k, float* values, int32_t* token_ids);

}  // namespace evospec

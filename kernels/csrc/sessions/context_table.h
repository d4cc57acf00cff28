// A bounded table of what followed each context, as decayed counts.
#pragma once

#include <cstdint>

#include "slot_array.h"

namespace evospec {

// Counts of (context, next token), in rows of one context each; the weakest are overwritten.
//
// A context is a number from 0 to 2^63 - 1. It lives in one of the kWays rows from home(key) on; if others have them all,
// the row with the smallest sum of counts is overwritten. In a full row, the smallest count is. So a read looks at kWays
// keys and one row of tokens, and memory is fixed. What a count of 1 is worth is up to the caller, who can let it grow
// instead of having all older counts decay.
struct ContextTable {
  static constexpr int kWays = 8;

  int64_t* keys;    // [rows]; -1: none
  int32_t* tokens;  // [rows][width]; -1: none
  float* counts;    // [rows][width]
  int32_t width;
  int32_t shift;    // of a hash: 64 less the bits of rows / kWays

  // The row of a context, -1 if it has none.
  int64_t find(int64_t key) const;
  // One more continuation of a context, worth `amount`.
  void add(int64_t key, int32_t token, double amount) const;
  // Whether a token has followed a context.
  bool has(int64_t key, int32_t token) const;

 private:
  int64_t home(int64_t key) const;
  int64_t take_row(int64_t key) const;
};

// A table for each slot. `rows` is a power of 2, at least kWays.
class ContextTables {
 public:
  ContextTables(int slots, int rows, int width);

  ContextTable of(int slot) const { return {keys_.of(slot), tokens_.of(slot), counts_.of(slot), width_, shift_}; }
  void clear(int slot);
  void scale(int slot, float factor);
  size_t num_bytes() const { return keys_.num_bytes() + tokens_.num_bytes() + counts_.num_bytes(); }

 private:
  int rows_, width_, shift_;
  SlotArray<int64_t> keys_;
  SlotArray<int32_t> tokens_;
  SlotArray<float> counts_;
};

}  // namespace evospec

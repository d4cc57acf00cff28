// What followed the longest repeats of a text's last tokens, in the text itself.
//
// Counts of triples forget how long a repeat is. A text that is being copied agrees with its source over many tokens, and
// the longer it has, the surer it goes on.
#pragma once

#include <cstdint>

#include "slot_array.h"

namespace evospec {

// The last `capacity` tokens of a text at most, and for each pair of them the places where it ends.
struct TextIndex {
  static constexpr int kMinLength = 2, kMaxLength = 16;  // tokens that must agree; more make no difference
  static constexpr int kMaxPlaces = 16;                  // earlier places that are looked at, the latest first

  int32_t* tokens;    // [capacity]
  int32_t* previous;  // [capacity]: of each place the one before it in its chain; -1: none
  int32_t* latest;    // [buckets]: the last place right after each pair; -1: none
  int32_t* size;
  int32_t capacity, buckets;
  uint64_t factor;  // of the pairs' hashes

  // Appends to the text. Where it is full, the older half of it is forgotten.
  void extend(const int32_t* token_ids, int count) const;

  // token_ids, lengths [kMaxPlaces]: tokens that followed a repeat of the text's end, each once, with the length of the
  // longest such repeat. The text is taken to go on with `after`. Returns how many.
  int find(const int32_t* after, int count, int32_t* token_ids, int32_t* lengths) const;

  // `count` tokens that followed the longest repeat of the text's end, of equals the latest; where the text ends, what
  // was copied comes again. Returns the length of the repeat; 0: nothing repeats.
  int copy_longest(int32_t* token_ids, int count) const;

 private:
  // visit(place, length): the places after which the `length` tokens of `end`, at least two, may go on as before.
  template <typename Visit>
  void for_each_repeat(const int32_t* end, int length, Visit visit) const;

  int32_t& bucket(int32_t first, int32_t second) const;
  void append(int32_t token) const;
  void forget_half() const;
};

class TextIndexes {
 public:
  TextIndexes(int slots, int capacity);

  TextIndex of(int slot) const {
    return {tokens_.of(slot), previous_.of(slot), latest_.of(slot), sizes_.of(slot), capacity_, buckets_, factor_};
  }
  void clear(int slot);
  size_t num_bytes() const { return tokens_.num_bytes() + previous_.num_bytes() + latest_.num_bytes(); }

 private:
  int capacity_, buckets_;
  uint64_t factor_;
  SlotArray<int32_t> tokens_, previous_, latest_, sizes_;
};

}  // namespace evospec

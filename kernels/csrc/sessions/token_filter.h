// A set of tokens in a few cache lines, which may hold more than were added.
#pragma once

#include <cstdint>

namespace evospec {

// Tokens of equal remainders share one of kBits bits. All zeros at first.
template <uint32_t kBits>
struct TokenFilter {
  uint64_t words[kBits / 64];

  void add(uint32_t token) { words[token % kBits / 64] |= uint64_t{1} << token % 64; }
  bool may_hold(uint32_t token) const { return (words[token % kBits / 64] >> token % 64 & 1) != 0; }
};

}  // namespace evospec

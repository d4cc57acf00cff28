// Hashes of what clients choose, as tokens of their texts.
#pragma once

#include <cstdint>
#include <random>

namespace evospec {

// What only this process knows, so that nobody can make texts whose hashes are all the same. It is odd, and below zero as
// a signed number, so that it is one of 64 bits wherever it is passed on.
inline uint64_t random_factor() {
  std::random_device random;
  return uint64_t{random()} << 32 | random() | uint64_t{1} << 63 | 1;
}

// 32 bits, of any of which a table's place can be made.
inline uint32_t scattered(uint64_t key, uint64_t factor) {
  const uint64_t mixed = key * factor;
  return static_cast<uint32_t>((mixed ^ mixed >> 32) * factor >> 32);
}

}  // namespace evospec

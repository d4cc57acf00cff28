// What followed the longest repeats of a text's last tokens (engine/vocab/text_matches.py says what is found).
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace evospec {

class TextIndex {
 public:
  static constexpr int kMinLength = 2, kMaxLength = 16;  // tokens that must agree; more make no difference
  static constexpr int kMaxPlaces = 16;                  // earlier places that are looked at, the latest first

  void extend(const int32_t* token_ids, int count);

  // token_ids, lengths [kMaxPlaces]: tokens that followed a repeat of the text's end, each once, with the length of the
  // longest such repeat. The text is taken to go on with `after`. Returns how many.
  int find(const int32_t* after, int count, int32_t* token_ids, int32_t* lengths) const;

  // The place right after the longest repeat of the text's end, of equals the latest; -1 (and length 0): none.
  int longest(int32_t* length) const;

 private:
  // visit(place, length): the places after which the `size` tokens of `end`, at least two, may go on as before.
  template <typename Visit>
  void for_each_repeat(const int32_t* end, int size, Visit visit) const;

  static int64_t key(int64_t first, int64_t second) { return first << 31 | second; }

  std::vector<int32_t> tokens_;
  std::vector<int32_t> previous_;                // of each place the one before it in its chain; -1: none
  std::unordered_map<int64_t, int32_t> latest_;  // pair of tokens -> the last place right after it
};

}  // namespace evospec

#include "text_index.h"

#include <algorithm>

namespace evospec {

void TextIndex::extend(const int32_t* token_ids, int count) {
  for (int i = 0; i < count; ++i) {
    const int32_t place = static_cast<int32_t>(tokens_.size());
    int32_t before = -1;
    if (place >= kMinLength) {
      const auto [found, is_new] = latest_.try_emplace(key(tokens_[place - 2], tokens_[place - 1]), place);
      if (!is_new) {
        before = found->second;
        found->second = place;
      }
    }
    previous_.push_back(before);
    tokens_.push_back(token_ids[i]);
  }
}

int TextIndex::find(const int32_t* after, int count, int32_t* token_ids, int32_t* lengths) const {
  int32_t end[kMaxLength];  // the last tokens of text and `after`
  const int of_after = std::min(count, kMaxLength);
  const int of_text = std::min<int>(kMaxLength - of_after, tokens_.size());
  std::copy(tokens_.end() - of_text, tokens_.end(), end);
  std::copy(after + count - of_after, after + count, end + of_text);
  const int size = of_text + of_after;
  if (size < kMinLength) return 0;

  int found = 0;
  for_each_repeat(end, size, [&](int32_t place, int length) {
    const int at = static_cast<int>(std::find(token_ids, token_ids + found, tokens_[place]) - token_ids);
    if (at == found) {
      token_ids[found] = tokens_[place];
      lengths[found++] = length;
    } else {
      lengths[at] = std::max(lengths[at], length);
    }
  });
  return found;
}

int TextIndex::longest(int32_t* length) const {
  const int size = std::min<int>(kMaxLength, tokens_.size());
  int32_t best = -1;
  *length = 0;
  if (size < kMinLength) return best;
  for_each_repeat(tokens_.data() + tokens_.size() - size, size, [&](int32_t place, int agreed) {
    if (agreed > *length) best = place, *length = agreed;
  });
  return best;
}

template <typename Visit>
void TextIndex::for_each_repeat(const int32_t* end, int size, Visit visit) const {
  const auto latest = latest_.find(key(end[size - 2], end[size - 1]));
  int32_t place = latest == latest_.end() ? -1 : latest->second;
  for (int i = 0; i < kMaxPlaces && place >= 0; ++i, place = previous_[place]) {
    int length = kMinLength;
    const int most = std::min(size, place);
    while (length < most && tokens_[place - length - 1] == end[size - length - 1]) ++length;
    visit(place, length);
  }
}

}  // namespace evospec

extern "C" {

using evospec::TextIndex;

TextIndex* evo_text_new() { return new TextIndex; }
void evo_text_free(TextIndex* text) { delete text; }
void evo_text_extend(TextIndex* text, const int32_t* token_ids, int count) { text->extend(token_ids, count); }
int evo_text_find(const TextIndex* text, const int32_t* after, int count, int32_t* token_ids, int32_t* lengths) {
  return text->find(after, count, token_ids, lengths);
}
int evo_text_longest(const TextIndex* text, int32_t* length) { return text->longest(length); }

}  // extern "C"

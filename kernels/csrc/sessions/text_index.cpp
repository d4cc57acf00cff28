#include "text_index.h"

#include <algorithm>

#include "scattered.h"

namespace evospec {

// Where a pair's last place is kept, or would be: the pair is found again in the text before that place.
int32_t& TextIndex::bucket(int32_t first, int32_t second) const {
  const uint64_t key = static_cast<uint64_t>(first) << 32 | static_cast<uint32_t>(second);
  uint32_t at = scattered(key, factor) & (buckets - 1);
  while (latest[at] >= 0 && (tokens[latest[at] - 2] != first || tokens[latest[at] - 1] != second)) {
    at = (at + 1) & (buckets - 1);
  }
  return latest[at];
}

void TextIndex::append(int32_t token) const {
  const int32_t place = *size;
  previous[place] = -1;
  if (place >= kMinLength) {
    int32_t& last = bucket(tokens[place - 2], tokens[place - 1]);
    previous[place] = last;
    last = place;
  }
  tokens[place] = token;
  ++*size;
}

void TextIndex::forget_half() const {
  const int32_t kept = *size / 2, first = *size - kept;
  std::copy(tokens + first, tokens + *size, tokens);
  std::fill_n(latest, buckets, -1);
  *size = 0;
  for (int32_t i = 0; i < kept; ++i) append(tokens[i]);
}

void TextIndex::extend(const int32_t* token_ids, int count) const {
  const int32_t skipped = std::max(0, count - capacity);
  for (int32_t i = skipped; i < count; ++i) {
    if (*size == capacity) forget_half();
    append(token_ids[i]);
  }
}

int TextIndex::find(const int32_t* after, int count, int32_t* token_ids, int32_t* lengths) const {
  int32_t end[kMaxLength];  // the last tokens of text and `after`
  const int of_after = std::min(count, kMaxLength), of_text = std::min(kMaxLength - of_after, *size);
  std::copy(tokens + *size - of_text, tokens + *size, end);
  std::copy(after + count - of_after, after + count, end + of_text);
  int found = 0;
  for_each_repeat(end, of_text + of_after, [&](int32_t place, int length) {
    const int at = static_cast<int>(std::find(token_ids, token_ids + found, tokens[place]) - token_ids);
    if (at == found) {
      token_ids[found] = tokens[place];
      lengths[found++] = length;
    } else {
      lengths[at] = std::max(lengths[at], length);
    }
  });
  return found;
}

int TextIndex::copy_longest(int32_t* token_ids, int count) const {
  const int of_text = std::min(kMaxLength, *size);
  int32_t best = -1;
  int longest = 0;
  for_each_repeat(tokens + *size - of_text, of_text, [&](int32_t place, int length) {
    if (length > longest) best = place, longest = length;
  });
  for (int i = 0; longest > 0 && i < count; ++i) token_ids[i] = tokens[best + i % (*size - best)];
  return longest;
}

template <typename Visit>
void TextIndex::for_each_repeat(const int32_t* end, int length, Visit visit) const {
  if (length < kMinLength) return;
  int32_t place = bucket(end[length - 2], end[length - 1]);
  for (int i = 0; i < kMaxPlaces && place >= 0; ++i, place = previous[place]) {
    int agreed = kMinLength;
    const int most = std::min(length, place);
    while (agreed < most && tokens[place - agreed - 1] == end[length - agreed - 1]) ++agreed;
    visit(place, agreed);
  }
}

static int buckets_for(int capacity) {
  int buckets = 16;
  while (buckets < 2 * capacity) buckets *= 2;
  return buckets;
}

TextIndexes::TextIndexes(int slots, int capacity)
    : capacity_(capacity),
      buckets_(buckets_for(capacity)),
      factor_(random_factor()),
      tokens_(slots, capacity),
      previous_(slots, capacity),
      latest_(slots, buckets_),
      sizes_(slots, 1) {
  for (int slot = 0; slot < slots; ++slot) *sizes_.of(slot) = 0;
}

void TextIndexes::clear(int slot) {
  latest_.fill(slot, -1);
  *sizes_.of(slot) = 0;
}

}  // namespace evospec

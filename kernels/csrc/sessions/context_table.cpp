#include "context_table.h"

#include <algorithm>
#include <numeric>

namespace evospec {

int64_t ContextTable::home(int64_t key) const {
  const uint64_t hash = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u;
  return static_cast<int64_t>(shift < 64 ? hash >> shift : 0) * kWays;
}

int64_t ContextTable::find(int64_t key) const {
  const int64_t first = home(key);
  for (int64_t row = first; row < first + kWays; ++row) {
    if (keys[row] == key) return row;
  }
  return -1;
}

bool ContextTable::has(int64_t key, int32_t token) const {
  const int64_t row = find(key);
  int32_t* const end = tokens + (row + 1) * width;
  return row >= 0 && std::find(tokens + row * width, end, token) != end;
}

// A row for a context that has none: a free one, else that of the smallest sum of counts.
int64_t ContextTable::take_row(int64_t key) const {
  const int64_t first = home(key);
  int64_t row = std::find(keys + first, keys + first + kWays, -1) - keys;
  if (row == first + kWays) {
    float least = 0.0f;
    for (int64_t r = first; r < first + kWays; ++r) {
      const float sum = std::accumulate(counts + r * width, counts + (r + 1) * width, 0.0f);
      if (r == first || sum < least) row = r, least = sum;
    }
    std::fill_n(tokens + row * width, width, -1);
    std::fill_n(counts + row * width, width, 0.0f);
  }
  keys[row] = key;
  return row;
}

void ContextTable::add(int64_t key, int32_t token, double amount) const {
  const int64_t known = find(key), row = known < 0 ? take_row(key) : known;
  int32_t* const of_row = tokens + row * width;
  float* const counted = counts + row * width;
  const int64_t at = std::find(of_row, of_row + width, token) - of_row;
  if (at < width) {
    counted[at] = static_cast<float>(counted[at] + amount);
    return;
  }
  int64_t place = std::find(of_row, of_row + width, -1) - of_row;
  if (place == width) place = std::min_element(counted, counted + width) - counted;
  of_row[place] = token;
  counted[place] = static_cast<float>(amount);
}

ContextTables::ContextTables(int slots, int rows, int width)
    : rows_(rows),
      width_(width),
      shift_(64),
      keys_(slots, rows),
      tokens_(slots, static_cast<size_t>(rows) * width),
      counts_(slots, static_cast<size_t>(rows) * width) {
  for (int groups = rows / ContextTable::kWays; groups > 1; groups /= 2) --shift_;
}

void ContextTables::clear(int slot) {
  keys_.fill(slot, -1);
  tokens_.fill(slot, -1);
  counts_.fill(slot, 0.0f);
}

void ContextTables::scale(int slot, float factor) {
  float* const counts = counts_.of(slot);
  for (size_t i = 0; i < static_cast<size_t>(rows_) * width_; ++i) counts[i] *= factor;
}

}  // namespace evospec

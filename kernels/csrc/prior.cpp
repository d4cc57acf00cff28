#include "prior.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace evospec {

namespace {

constexpr int kIdBits = 31;

// The first of the rows in which a context can live.
int64_t home_of(const ContextTable& table, int64_t key, int ways) {
  const uint64_t hash = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u;
  return static_cast<int64_t>(table.shift < 64 ? hash >> table.shift : 0) * ways;
}

// The row of a context, -1 if it has none.
int64_t find(const ContextTable& table, int64_t key, int ways) {
  const int64_t home = home_of(table, key, ways);
  for (int64_t row = home; row < home + ways; ++row) {
    if (table.keys[row] == key) return row;
  }
  return -1;
}

void increase(float& count, double amount) { count = static_cast<float>(count + amount); }

// A row for a context that has none: a free one, else that of the smallest sum of counts.
int64_t take_row(const ContextTable& table, int64_t key, int ways) {
  const int64_t home = home_of(table, key, ways);
  int64_t row = std::find(table.keys + home, table.keys + home + ways, -1) - table.keys;
  if (row == home + ways) {
    float least = 0.0f;
    for (int64_t r = home; r < home + ways; ++r) {
      const float sum = std::accumulate(table.counts + r * table.width, table.counts + (r + 1) * table.width, 0.0f);
      if (r == home || sum < least) row = r, least = sum;
    }
    std::fill_n(table.token_ids + row * table.width, table.width, -1);
    std::fill_n(table.counts + row * table.width, table.width, 0.0f);
  }
  table.keys[row] = key;
  return row;
}

// One more continuation of a context; in a full row it takes the place of the smallest count.
void add_count(const ContextTable& table, int64_t key, int32_t token, double amount, int ways) {
  const int64_t known = find(table, key, ways), row = known < 0 ? take_row(table, key, ways) : known;
  int32_t* token_ids = table.token_ids + row * table.width;
  float* counts = table.counts + row * table.width;
  const int64_t at = std::find(token_ids, token_ids + table.width, token) - token_ids;
  if (at < table.width) return increase(counts[at], amount);
  int64_t place = std::find(token_ids, token_ids + table.width, -1) - token_ids;
  if (place == table.width) place = std::min_element(counts, counts + table.width) - counts;
  token_ids[place] = token;
  counts[place] = static_cast<float>(amount);
}

// features[column] = value for every column that holds the token.
void mark(const int32_t* token_ids, int columns, int32_t token, float value, float* features) {
  for (int i = 0; i < columns; ++i) {
    if (token_ids[i] == token) features[i * kPriorFeatures] = value;
  }
}

void mark_counts(const ContextTable& table, int64_t key, int ways, double unit, const int32_t* token_ids, int columns,
                 float* features) {
  const int64_t row = find(table, key, ways);
  if (row < 0) return;
  for (int64_t i = row * table.width; i < (row + 1) * table.width; ++i) {
    if (table.token_ids[i] < 0) continue;
    const float count = table.counts[i] / static_cast<float>(unit);
    mark(token_ids, columns, table.token_ids[i], std::log1p(count), features);
  }
}

void mark_graph(const PriorGraph& graph, int64_t token, const int32_t* token_ids, int columns, float* features) {
  const int64_t begin = graph.offsets[token], end = std::min(graph.offsets[token + 1], begin + graph.width);
  for (int64_t i = begin; i < end; ++i) {
    mark(token_ids, columns, graph.token_ids[i], 1.0f + graph.log_probs[i] * graph.scale, features);
  }
}

void row_features(const PriorRows& rows, const PriorGraph& graph, int row, float* features) {
  const int32_t* token_ids = rows.token_ids + static_cast<size_t>(row) * rows.columns;
  const PriorSession& session = *rows.sessions[row];
  const int64_t two_ago = rows.contexts[2 * row], one_ago = rows.contexts[2 * row + 1];
  const double unit = rows.units[row];
  const float least = static_cast<float>(rows.presence_floor * unit);
  std::fill_n(features, rows.columns * kPriorFeatures, 0.0f);
  for (int i = 0; i < rows.columns; ++i) {
    if (token_ids[i] >= 0 && session.unigrams[token_ids[i]] >= least) features[i * kPriorFeatures] = 1.0f;
  }
  if (one_ago >= 0) {
    if (rows.used[1] > 0) mark_counts(session.bigrams, one_ago, rows.ways, unit, token_ids, rows.columns, features + 1);
    if (rows.used[3] > 0) mark_graph(graph, one_ago, token_ids, rows.columns, features + 3);
    if (rows.used[2] > 0 && two_ago >= 0) {
      const int64_t key = two_ago << kIdBits | one_ago;
      mark_counts(session.trigrams, key, rows.ways, unit, token_ids, rows.columns, features + 2);
    }
  }
  for (int i = row * rows.matches; i < (row + 1) * rows.matches; ++i) {
    if (rows.match_ids[i] >= 0) mark(token_ids, rows.columns, rows.match_ids[i], rows.match_values[i], features + 4);
  }
}

void add_bonus(const float* logits, const float* features, const float* weights, int columns, float* scores) {
  for (int i = 0; i < columns; ++i) {
    float bonus = 0.0f;
    for (int f = 0; f < kPriorFeatures; ++f) bonus += features[i * kPriorFeatures + f] * weights[f];
    scores[i] = logits[i] + bonus;
  }
}

int first_choice(const float* scores, int columns) {
  return static_cast<int>(std::max_element(scores, scores + columns) - scores);
}

// ascent [kPriorFeatures] += the gradient of a lesson. `scores` is used up.
void learn_one(const PriorLessons& lessons, int n, float* scores, float* ascent, int32_t* advantage,
               int32_t* of_repeat) {
  const int32_t *token_ids = lessons.token_ids[n], wanted = lessons.targets[n];
  const float *logits = lessons.logits[n], *features = lessons.features[n];
  const int columns = lessons.columns;
  add_bonus(logits, features, lessons.weights[n], columns, scores);
  const int with = first_choice(scores, columns), without = first_choice(logits, columns);
  int target = 0;
  while (target < columns && !(token_ids[target] == wanted && std::isfinite(logits[target]))) ++target;
  if (target < columns) {
    double sum = 0.0, expected[kPriorFeatures] = {};
    for (int i = 0; i < columns; ++i) {
      const float weight = std::exp(scores[i] - scores[with]);
      sum += weight;
      for (int f = 0; f < kPriorFeatures; ++f) expected[f] += weight * features[i * kPriorFeatures + f];
    }
    // A sum that is no number, of infinite logits, would make the weights none for good.
    for (int f = 0; f < kPriorFeatures && std::isfinite(sum); ++f) {
      ascent[f] += features[target * kPriorFeatures + f] - static_cast<float>(expected[f] / sum);
    }
  }
  add_repeat_bonus(features, columns, lessons.repeat_bonus, scores);
  const bool is_right = token_ids[with] == wanted;
  *advantage = is_right - (token_ids[without] == wanted);
  *of_repeat = (token_ids[first_choice(scores, columns)] == wanted) - is_right;
}

}  // namespace

void prior_scores(const PriorRows& rows, const PriorGraph& graph, float* features, float* scores) {
  for (int row = 0; row < rows.rows; ++row) {
    const size_t begin = static_cast<size_t>(row) * rows.columns;
    row_features(rows, graph, row, features + begin * kPriorFeatures);
    add_bonus(rows.logits + begin, features + begin * kPriorFeatures, rows.weights + row * kPriorFeatures, rows.columns,
              scores + begin);
  }
}

void add_repeat_bonus(const float* features, int columns, float bonus, float* scores) {
  int longest = -1;
  float most = 0.0f;
  for (int i = 0; i < columns; ++i) {
    const float match = features[i * kPriorFeatures + kPriorFeatures - 1];
    if (match > most) longest = i, most = match;
  }
  if (most >= kLongRepeat) scores[longest] += bonus;
}

double observe_ngrams(const PriorSession& session, const int32_t* token_ids, int count, int64_t two_ago, int64_t one_ago,
                      double growth, double unit, int ways) {
  for (int i = 0; i < count; ++i) {
    const int32_t token = token_ids[i];
    unit *= growth;
    increase(session.unigrams[token], unit);
    if (one_ago >= 0) {
      add_count(session.bigrams, one_ago, token, unit, ways);
      if (two_ago >= 0) add_count(session.trigrams, two_ago << kIdBits | one_ago, token, unit, ways);
    }
    two_ago = one_ago;
    one_ago = token;
  }
  return unit;
}

void prior_learn(const PriorLessons& lessons, int32_t* advantages, int32_t* of_repeats) {
  std::vector<float> ascents(static_cast<size_t>(lessons.count) * kPriorFeatures), scores(lessons.columns);
  for (int n = 0; n < lessons.count; ++n) {
    learn_one(lessons, n, scores.data(), &ascents[n * kPriorFeatures], advantages + n, of_repeats + n);
  }
  for (int n = 0; n < lessons.count; ++n) {
    for (int f = 0; f < kPriorFeatures; ++f) {
      float& weight = lessons.weights[n][f];
      weight = std::clamp(weight + lessons.rate * ascents[n * kPriorFeatures + f], 0.0f, lessons.highest);
    }
  }
}

}  // namespace evospec

extern "C" {

void evo_prior_scores(const evospec::PriorRows* rows, const evospec::PriorGraph* graph, float* features, float* scores) {
  evospec::prior_scores(*rows, *graph, features, scores);
}

double evo_observe_ngrams(const evospec::PriorSession* session, const int32_t* token_ids, int count, int64_t two_ago,
                          int64_t one_ago, double growth, double unit, int ways) {
  return evospec::observe_ngrams(*session, token_ids, count, two_ago, one_ago, growth, unit, ways);
}

void evo_prior_learn(const evospec::PriorLessons* lessons, int32_t* advantages, int32_t* of_repeats) {
  evospec::prior_learn(*lessons, advantages, of_repeats);
}

}  // extern "C"

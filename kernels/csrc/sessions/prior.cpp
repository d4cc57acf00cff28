// The prior: a bonus on a candidate's logit for what followed before, with weights learned while it serves.
//
// A light draft misses what a session repeats; a strong one copies it by itself. So each candidate gets features . weights,
// and each verified position moves the weights by one step of gradient ascent on log softmax(scores)[the target's token].
// Where the draft needs no help they fade to zero. Likelihood and agreement are not the same: with a draft that is right
// but unsure of itself, weights that make the target's tokens likelier can still cost agreement. So first choices are
// counted with and without the prior, and it is left out while it costs more than it brings. It goes on learning meanwhile.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "sessions.h"

namespace evospec {

namespace {

constexpr int kLanes = 16;  // sums that are kept apart, so that a compiler can use vectors

using CandidateFilter = TokenFilter<1024>;  // most of what followed is no candidate

// feature [columns] = value for every column that holds the token.
void mark(const Candidates& candidates, float* feature, int32_t token, float value) {
  for (int i = 0; i < candidates.columns; ++i) feature[i] = candidates.tokens[i] == token ? value : feature[i];
}

void mark_counts(const Candidates& candidates, const CandidateFilter& filter, float* feature,
                 const ContextTable& table, int64_t key, double unit) {
  const int64_t row = table.find(key);
  if (row < 0) return;
  for (int64_t i = row * table.width; i < (row + 1) * table.width; ++i) {
    if (table.tokens[i] < 0 || !filter.may_hold(table.tokens[i])) continue;
    mark(candidates, feature, table.tokens[i], std::log1p(table.counts[i] / static_cast<float>(unit)));
  }
}

void mark_graph(const Candidates& candidates, const CandidateFilter& filter, float* feature, const Graph& graph,
                int64_t token) {
  const int64_t begin = graph.offsets[token], end = std::min(graph.offsets[token + 1], begin + graph.width);
  for (int64_t i = begin; i < end; ++i) {
    if (!filter.may_hold(graph.tokens[i])) continue;
    mark(candidates, feature, graph.tokens[i], 1.0f + graph.log_probs[i] * graph.scale);
  }
}

// features [kFeatures][columns].
void add_bonuses(const float* logits, const float* features, const float* weights, int columns, float* scores) {
  std::copy_n(logits, columns, scores);
  for (int f = 0; f < kFeatures; ++f) {
    const float weight = weights[f], *const feature = features + f * columns;
    for (int i = 0; i < columns; ++i) scores[i] += feature[i] * weight;
  }
}

int first_choice(const float* scores, int columns) {
  return static_cast<int>(std::max_element(scores, scores + columns) - scores);
}

// e^x for x <= 0 to 7 digits, by a polynomial between powers of 2; 0 for very small ones and for no number.
float exp_of(float x) {
  const float y = std::max(x, -87.0f) * 1.44269504f, whole = std::nearbyint(y), z = y - whole;
  const float fraction =
      1.0f + z * (0.693147180f + z * (0.240226507f + z * (0.0555041087f + z * (0.00961812911f + z * 0.00133335581f))));
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x >= -87.0f ? fraction * power : 0.0f;
}

float sum_of_products(const float* a, const float* b, int count) {
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return std::accumulate(sums, sums + kLanes, 0.0f);
}

}  // namespace

Repeats Sessions::repeats(const TextIndexes& texts, int text, const int32_t* drafts, int count) const {
  Repeats found;
  found.count = 0;
  if (text >= 0 && options_.uses[kFeatures - 1] > 0.0f) {
    found.count = texts.of(text).find(drafts, count, found.tokens, found.lengths);
  }
  return found;
}

void Sessions::score(int session, const int32_t* drafts, int count, const Repeats& repeats,
                     const Candidates& candidates, float* scores) const {
  const int32_t* const last = state(session).last;
  const int64_t context[2] = {count >= 2 ? drafts[count - 2] : last[count], count >= 1 ? drafts[count - 1] : last[1]};
  features(session, context, repeats, candidates);
  constexpr float kNone[kFeatures] = {};
  const float* const weights = state(session).gain >= 0.0 ? weights_.of(session) : kNone;
  add_bonuses(candidates.logits, candidates.features, weights, candidates.columns, scores);
}

void Sessions::features(int session, const int64_t context[2], const Repeats& repeats,
                        const Candidates& candidates) const {
  const float* const uses = options_.uses;
  const double unit = state(session).unit;
  const float* const unigrams = unigrams_.of(session);
  const float least = static_cast<float>(options_.presence * unit);
  std::fill_n(candidates.features, candidates.columns * kFeatures, 0.0f);
  const auto feature = [&](int number) { return candidates.features + number * candidates.columns; };
  const TokenFilter<8192>& counted = *counted_.of(session);
  CandidateFilter filter = {};
  for (int i = 0; i < candidates.columns; ++i) {
    const int32_t token = candidates.tokens[i];
    filter.add(token);
    if (token >= 0 && counted.may_hold(token) && unigrams[token] >= least) feature(0)[i] = 1.0f;
  }
  if (context[1] >= 0) {
    if (uses[1] > 0) mark_counts(candidates, filter, feature(1), bigrams_.of(session), context[1], unit);
    if (uses[2] > 0 && context[0] >= 0) {
      mark_counts(candidates, filter, feature(2), trigrams_.of(session), context[0] << 31 | context[1], unit);
    }
    if (uses[3] > 0) mark_graph(candidates, filter, feature(3), options_.graph, context[1]);
  }
  for (int i = 0; i < repeats.count; ++i) {
    mark(candidates, feature(4), repeats.tokens[i], std::log(static_cast<float>(repeats.lengths[i])));
  }
}

void Sessions::followers(int session, int order, const int64_t context[2], int32_t* tokens, float* values) const {
  const ContextTable table = order == 2 ? bigrams_.of(session) : trigrams_.of(session);
  const bool is_known = context[1] >= 0 && (order == 2 || context[0] >= 0);
  const int64_t row = is_known ? table.find(order == 2 ? context[1] : context[0] << 31 | context[1]) : -1;
  for (int i = 0; i < table.width; ++i) {
    tokens[i] = row < 0 ? -1 : table.tokens[row * table.width + i];
    const float count = row < 0 ? 0.0f : table.counts[row * table.width + i];
    values[i] = std::log1p(count / static_cast<float>(state(session).unit));
  }
}

// Learns from the positions that verification reached; all gradients are taken at the weights before.
void Sessions::learn_prior(int session, const int32_t* targets, int reached) {
  if (!options_.learns || reached == 0) return;
  SessionState& known = state(session);
  float* const weights = weights_.of(session);
  std::vector<float> scores, ones, ascents(static_cast<size_t>(reached) * kFeatures);
  for (int round = 0; round < reached; ++round) {
    const Candidates own = rounds_.of(round, known.row);
    const int columns = own.columns;
    scores.resize(columns), ones.resize(columns, 1.0f);
    add_bonuses(own.logits, own.features, weights, columns, scores.data());
    const int with = first_choice(scores.data(), columns), without = first_choice(own.logits, columns);
    const int32_t wanted = targets[round];
    known.gain = known.gain * options_.gain_memory + (own.tokens[with] == wanted) - (own.tokens[without] == wanted);
    ++counts(session).num_lessons;
    int target = 0;
    while (target < columns && !(own.tokens[target] == wanted && std::isfinite(own.logits[target]))) ++target;
    if (target == columns) continue;
    const float most = scores[with];
    for (int i = 0; i < columns; ++i) scores[i] = exp_of(scores[i] - most);
    const float sum = sum_of_products(scores.data(), ones.data(), columns);
    // A sum that is no number, of infinite logits, would make the weights none for good.
    for (int f = 0; f < kFeatures && std::isfinite(sum) && std::isfinite(most); ++f) {
      const float* const feature = own.features + f * columns;
      ascents[round * kFeatures + f] = feature[target] - sum_of_products(scores.data(), feature, columns) / sum;
    }
  }
  for (int i = 0; i < reached * kFeatures; ++i) {
    float& weight = weights[i % kFeatures];
    weight = std::clamp(weight + options_.rate * ascents[i], 0.0f, options_.most_weight);
  }
}

}  // namespace evospec

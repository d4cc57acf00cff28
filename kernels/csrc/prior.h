// The prior on draft logits (engine/vocab/prior.py): bonuses by what followed before, and what verification teaches.
#pragma once

#include <cstdint>

namespace evospec {

constexpr int kPriorFeatures = 5;  // in session, bigram, trigram, graph, match
constexpr float kLongRepeat = 1.38f;  // match of a repeat of four tokens: log 4

// A bounded hash table of contexts and what followed them (engine/vocab/context_table.py).
struct ContextTable {
  int64_t* keys;       // [rows]; -1: none
  int32_t* token_ids;  // [rows][width]; -1: none
  float* counts;       // [rows][width]
  int32_t shift;             // of the hash: 64 less the bits of rows / ways
  int32_t width;
};

// What a session has said.
struct PriorSession {
  float* unigrams;  // [vocab]
  ContextTable bigrams;
  ContextTable trigrams;
};

// Followers of each token in general text (engine/vocab/bigram_graph.py); offsets null: no graph.
struct PriorGraph {
  const int64_t* offsets;
  const int32_t* token_ids;
  const float* log_probs;
  int32_t width;  // most followers of a token
  float scale;    // a follower's value is 1 + log_prob * scale
};

struct PriorRows {
  const PriorSession* const* sessions;  // [rows]
  const double* units;                  // [rows]: what one occurrence is worth in the session's counts
  const int64_t* contexts;              // [rows][2]: the token two ago and the last; -1: none
  const float* weights;                 // [rows][kPriorFeatures]
  const int32_t* match_ids;             // [rows][matches]; -1: none
  const float* match_values;            // [rows][matches]
  const int32_t* token_ids;             // [rows][columns]; -1: none
  const float* logits;                  // [rows][columns]
  const float* used;                    // [kPriorFeatures]: 1 or 0
  int32_t rows, columns, matches, ways;
  double presence_floor;  // counts below this many occurrences are no presence
};

// Counts a run of tokens of a session (engine/vocab/ngrams.py): each is worth `growth` times the one before it, the first
// growth * unit. two_ago and one_ago: the tokens before them, -1: none. Returns what the last one was worth.
double observe_ngrams(const PriorSession& session, const int32_t* token_ids, int count, int64_t two_ago, int64_t one_ago,
                      double growth, double unit, int ways);

// features [rows][columns][kPriorFeatures] and scores [rows][columns] = logits + features . weights.
void prior_scores(const PriorRows& rows, const PriorGraph& graph, float* features, float* scores);

// The bonus of a row's longest repeat, if it is long, added to the candidate that continues it; of equals to the first.
void add_repeat_bonus(const float* features, int columns, float bonus, float* scores);

// Positions that verification reached; each points to its row of candidates.
struct PriorLessons {
  const int32_t* const* token_ids;  // [count][columns]
  const float* const* logits;       // [count][columns]; -inf: none or unknown
  const float* const* features;     // [count][columns][kPriorFeatures]
  float* const* weights;            // [count][kPriorFeatures]; the same may come more than once
  const int32_t* targets;           // [count]
  int32_t count, columns;
  float rate, highest, repeat_bonus;
};

// Moves all weights by `rate` times the gradient of log softmax(scores)[target] at the weights before, within 0 and
// `highest`; not where the target is no candidate.
// advantages [count]: 1 where only the prior's first choice is the target, -1 where only the draft's own is, else 0.
// of_repeats [count]: the same of the prior with and without the bonus of long repeats.
void prior_learn(const PriorLessons& lessons, int32_t* advantages, int32_t* of_repeats);

}  // namespace evospec

// What running sequences know of their own texts, and what their draft vocabularies and priors make of it.
//
// Each has a slot in arrays of fixed sizes: decayed counts of single tokens, pairs and triples; a tail, the tokens that it
// can draft besides the core that all can; the weights of its prior, a bonus on the logits of what followed before. No
// call depends on how many sequences a step has, and nothing in the arrays points anywhere.
//
// One thread makes all calls. What a step teaches may be learned in the background, until `settle` is called.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "arc_tail.h"
#include "background.h"
#include "context_table.h"
#include "draft_rounds.h"
#include "text_index.h"
#include "token_filter.h"
#include "token_rows.h"

namespace evospec {

constexpr int kMaxInsertions = 32;     // tokens that a verified step puts into a tail, at most (the paper's)
constexpr int kMaxPromptTokens = 4096;  // the last tokens of a prompt, which are looked at
constexpr int kNeighbours = 8;         // tokens that each seed brings from the graph (the paper's)

// What named a token of a tail.
enum Source : int32_t { kSnapshot, kTenant, kContext, kTarget, kGraph, kSemantic, kNumSources };

// Where a session stands; all counts since it began.
struct SessionCounts {
  int64_t verified;  // tokens of steps in which it was drafted for
  int64_t covered;   // of them, those that could have been drafted
  int64_t events;    // steps with a token that could not
  int64_t insertions[kNumSources];
  int64_t hits[kNumSources];  // accepted tokens outside the core, by what had named them
  int64_t num_read;           // tokens generated, drafted for or not
  int64_t num_counted;        // tokens in the n-grams, those of a restored session included
  int64_t num_lessons;        // positions from which the prior has learned
};

// What else is known of a session.
struct SessionState {
  double unit;      // what one occurrence of a token adds to its counts now
  double gain;      // positions where only the prior's first choice was right, less those of only the draft's; fading
  int32_t last[2];  // the last two tokens, the older first; -1: none
  int32_t left;     // how many tokens the verified step may still put into the tail
  uint32_t missed;  // the tokens of that step that could not have been drafted: bit i for token i
  int32_t row;          // of its drafts in the rounds of the step
  int32_t num_drafted;  // how many of its drafts are there
};

// Followers of each token in general text, the most likely first; offsets null: there is no graph.
struct Graph {
  const int64_t* offsets;  // [vocab + 1]
  const int32_t* tokens;
  const float* log_probs;
  int32_t width;  // most followers of a token that the prior looks at
  float scale;    // the prior's value of a follower is 1 + log_prob * scale
};

struct SessionOptions {
  int32_t sessions, vocab, places;  // places: of a tail; 0: there are no tails
  int32_t bigram_rows, bigram_width, trigram_rows, trigram_width;
  int32_t tenants, tenant_rows, tenant_width;  // tables of what followed what in each tenant's texts; 0: none
  int32_t only_recency;  // whether tails forget what was used longest ago, instead of by ARC
  int32_t in_context;    // whether the sequence's own tokens enter its tail
  int32_t learns;        // whether the weights of the prior follow verification
  float uses[kFeatures];  // 1 for the features that count, else 0
  float rate, most_weight, gain_memory;  // of learning
  double growth;          // each token is worth so many times the one before it
  double presence;        // of so many decayed occurrences on, a token is present
  const uint8_t* in_core;  // [vocab]: 1 for the tokens that all can draft
  Graph graph;
};

// Tokens that continue a repeat of a text's end, none twice, and how long the longest such repeat of each is.
struct Repeats {
  int32_t tokens[TextIndex::kMaxPlaces];
  int32_t lengths[TextIndex::kMaxPlaces];
  int32_t count;
};

// Makes what continues repeats a candidate, whatever the draft thinks of it: the weakest of the others make room.
// add(column) is called for each new one, whose logit is not known.
template <typename Add>
void include(const Repeats& repeats, const Candidates& own, Add add) {
  const int32_t* const end = repeats.tokens + repeats.count;
  int last = own.columns;
  for (const int32_t* token = repeats.tokens; token != end; ++token) {
    if (std::find(own.tokens, own.tokens + own.columns, *token) != own.tokens + own.columns) continue;
    do --last; while (last >= 0 && std::find(repeats.tokens, end, own.tokens[last]) != end);
    if (last < 0) return;
    own.tokens[last] = *token;
    add(last);
  }
}

// What a verified step teaches.
struct Lesson {
  TokenRows rows;         // the tokens that each got
  const int32_t* chosen;  // [num_chosen] rows, ascending, into whose tails what is likely to come enters
  const int32_t* likely;  // [tokens of the chosen rows][k]: what the target thought likely there, the best first
  int32_t num_chosen, k;
};

class Sessions {
 public:
  explicit Sessions(const SessionOptions& options);

  // A session begins, its counts at zero and its tail empty. weights [kFeatures].
  void clear(int session, const float* weights);
  // A sequence begins in a session: its prompt is counted, and its tail filled from the prompt's own tokens, then from
  // those of its past, then from its tenant's, while there is room.
  void begin(int session, const std::vector<std::vector<int32_t>>& sources);
  // Puts tokens into a tail, the most wanted first; at most `limit` that are new to it.
  int insert(int session, const int32_t* tokens, size_t count, Source source, int limit);

  // Tokens of steps in which a sequence was not drafted for.
  void catch_up(const TokenRows& rows);
  // Drafts of another step begin.
  void begin_drafts();
  // A row of the first round is a session's, or a session drafts in a later round; its row.
  int take_row(int session, int round, int row);
  // Whether what a session drafted before a round is in the rounds before.
  bool has_drafted(int session, int round) const { return round == 0 || state(session).num_drafted == round; }
  DraftRounds& rounds() { return rounds_; }

  // A step was verified. missed [rows]: the first token of each that could not have been drafted, -1: all could.
  void find_missed(const TokenRows& rows, int32_t* missed);
  // Learn from it; `find_missed` was asked about it. In the background: what `lesson` points to must stay.
  void learn(const Lesson& lesson, bool in_background);
  // Wait until what is learned in the background is.
  void settle() { background_.wait(); }

  // The repeats of a text (-1: none) that goes on with `drafts`, as far as the prior counts them.
  Repeats repeats(const TextIndexes& texts, int text, const int32_t* drafts, int count) const;
  // Features of a row's candidates, and scores [columns] = logits + features . weights.
  void score(int session, const int32_t* drafts, int count, const Repeats& repeats, const Candidates& candidates,
             float* scores) const;
  // What followed one (order 2) or two tokens: `width` of that table's tokens, -1 for none, and log(1 + count) of each.
  void followers(int session, int order, const int64_t context[2], int32_t* tokens, float* values) const;

  std::vector<TailWrite>& writes() { return writes_; }
  const SessionOptions& options() const { return options_; }

  float* unigrams(int session) const { return unigrams_.of(session); }
  ContextTable bigrams(int session) const { return bigrams_.of(session); }
  ContextTable trigrams(int session) const { return trigrams_.of(session); }
  float* weights(int session) const { return weights_.of(session); }
  SessionState& state(int session) const { return *states_.of(session); }
  SessionCounts& counts(int session) const { return *counts_.of(session); }
  ArcTail tail(int session) const { return tails_.of(session); }
  void clear_tenant(int tenant) { tenants_.clear(tenant); }
  size_t num_bytes() const;  // of a session

 private:
  class Names;

  bool is_outside(int32_t token) const { return in_core_[token] == 0; }
  std::vector<int32_t> outside(const int32_t* tokens, size_t count) const;
  void count(int session, const int32_t* tokens, size_t count, const int32_t before[2]);
  void rescale(int session);
  void read(int session, int tenant, const int32_t* tokens, size_t count);
  void count_prompt(int session, const std::vector<int32_t>& prompt);
  void features(int session, const int64_t context[2], const Repeats& repeats, const Candidates& candidates) const;
  void learn_step(const Lesson& lesson);
  void learn_prior(int session, const int32_t* targets, int reached);
  void follow(const TokenRow& row, const int32_t* tokens, int size);
  void retrieve(int session, int tenant, const int32_t* tokens, int count, const int32_t* likely, int k);
  void neighbours(int tenant, int32_t token, std::vector<int32_t>& out);

  SessionOptions options_;
  std::vector<uint8_t> in_core_;
  SlotArray<float> unigrams_, weights_;
  SlotArray<TokenFilter<8192>> counted_;  // in unigrams, which are spread over many cache lines
  ContextTables bigrams_, trigrams_, tenants_;
  SlotArray<SessionState> states_;
  SlotArray<SessionCounts> counts_;
  ArcTails tails_;
  SlotArray<int32_t> sources_;  // of each place of a tail
  std::vector<float> worths_;   // of each edge of the graph: as many tokens of a tenant's
  std::vector<uint32_t> named_in_;  // [vocab]: the last list that named each token
  uint32_t num_lists_ = 0;
  std::vector<TailWrite> writes_;
  DraftRounds rounds_;
  std::vector<int32_t> drafting_;  // sessions with drafts in the rounds
  Background background_;  // the last member, so that it ends first
};

// Names tokens of one list, to tell which come again.
class Sessions::Names {
 public:
  explicit Names(Sessions& sessions) : named_in_(sessions.named_in_.data()), list_(++sessions.num_lists_) {}
  bool is_new(int32_t token) { return std::exchange(named_in_[token], list_) != list_; }

 private:
  uint32_t* const named_in_;
  const uint32_t list_;
};

}  // namespace evospec

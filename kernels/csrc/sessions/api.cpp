// The C interface of sessions and texts, for kernels/native_sessions.py.
#include <algorithm>
#include <cmath>

#include "sessions.h"

namespace evospec {
namespace {

// The next draft token of each row: what it is chosen among, and where what is found goes.
struct DraftStep {
  int32_t rows, columns, num_drafts, num_included;
  const int32_t* sessions;  // [rows]; -1: none
  const int32_t* texts;     // [rows]; -1: none
  const int32_t* drafts;    // [rows][num_drafts]: those before this one
  int32_t* tokens;          // [rows][columns]
  float* logits;            // [rows][columns]: the draft's, then the scores
  int32_t* best;            // [rows]: the token of the largest score; any where no score is a number
  Repeats* repeats;         // [rows]
  int32_t* included;        // [2][rows * kMaxPlaces]: rows and tokens of candidates whose logits are not known

  const int32_t* drafts_of(int row) const { return drafts + static_cast<size_t>(row) * num_drafts; }
  Candidates candidates_of(int row) const {
    const size_t at = static_cast<size_t>(row) * columns;
    return {tokens + at, logits + at, nullptr, columns};
  }
  int32_t* included_tokens() const { return included + rows * TextIndex::kMaxPlaces; }
};

void include_repeats(const Sessions& sessions, const TextIndexes& texts, DraftStep& step) {
  step.num_included = 0;
  for (int row = 0; row < step.rows; ++row) {
    const int text = step.sessions[row] < 0 ? -1 : step.texts[row];
    step.repeats[row] = sessions.repeats(texts, text, step.drafts_of(row), step.num_drafts);
    const Candidates own = step.candidates_of(row);
    include(step.repeats[row], own, [&](int column) {
      step.included[step.num_included] = row;
      step.included_tokens()[step.num_included++] = own.tokens[column];
    });
  }
}

// Gives included candidates their logits; where one is not a number, that of the candidate that made room stays.
void set_included(const DraftStep& step, const float* logits) {
  for (int i = 0; i < step.num_included; ++i) {
    const Candidates own = step.candidates_of(step.included[i]);
    const int32_t* const at = std::find(own.tokens, own.tokens + own.columns, step.included_tokens()[i]);
    if (!std::isnan(logits[i])) own.logits[at - own.tokens] = logits[i];
  }
}

// Of a row without a session, or whose drafts before this one are not known, the scores are the logits.
void score(Sessions& sessions, const DraftStep& step) {
  const int round = step.num_drafts;
  sessions.rounds().begin(round, step.rows, step.columns);
  for (int row = 0; row < step.rows; ++row) {
    const int session = step.sessions[row];
    const Candidates given = step.candidates_of(row);
    if (session >= 0 && sessions.has_drafted(session, round)) {
      const Candidates own = sessions.rounds().of(round, sessions.take_row(session, round, row));
      std::copy_n(given.tokens, own.columns, own.tokens);
      std::copy_n(given.logits, own.columns, own.logits);
      sessions.score(session, step.drafts_of(row), round, step.repeats[row], own, given.logits);
    }
    const auto best = std::max_element(given.logits, given.logits + given.columns) - given.logits;
    step.best[row] = std::max(given.tokens[best], 0);
  }
}

// With what was learned in the background.
Sessions& settled(Sessions* sessions) {
  sessions->settle();
  return *sessions;
}

}  // namespace
}  // namespace evospec

extern "C" {

using namespace evospec;

// Hash of the sources that the library is made of.
const char* evo_sources() { return EVO_SOURCES; }

Sessions* evo_sessions_new(const SessionOptions* options) { return new Sessions(*options); }
void evo_sessions_free(Sessions* sessions) { delete sessions; }
int64_t evo_sessions_bytes(const Sessions* sessions) { return sessions->num_bytes(); }
void evo_sessions_clear(Sessions* sessions, int session, const float* weights) {
  settled(sessions).clear(session, weights);
}
void evo_sessions_clear_tenant(Sessions* sessions, int tenant) { settled(sessions).clear_tenant(tenant); }

// Whether all tokens are of the vocabulary.
int evo_sessions_know(const Sessions* sessions, const int32_t* tokens, int count) {
  return std::all_of(tokens, tokens + count, [&](int32_t token) {
    return token >= 0 && token < sessions->options().vocab;
  });
}

// tokens: of the prompt, then of its past, then of its tenant; sizes [3].
void evo_sessions_begin(Sessions* sessions, int session, const int32_t* tokens, const int32_t* sizes) {
  std::vector<std::vector<int32_t>> sources;
  for (int i = 0; i < 3; tokens += sizes[i++]) sources.emplace_back(tokens, tokens + sizes[i]);
  settled(sessions).begin(session, sources);
}

void evo_sessions_insert(Sessions* sessions, int session, const int32_t* tokens, int count, int source, int limit) {
  const int room = settled(sessions).options().places > 0 ? sessions->tail(session).room() : 0;
  sessions->insert(session, tokens, count, static_cast<Source>(source), limit >= 0 ? limit : room);
}

// These two take nothing, and return 0, where not all tokens are of the vocabulary.
int evo_sessions_catch_up(Sessions* sessions, const TokenRows* rows) {
  const int known = evo_sessions_know(sessions, rows->all_tokens, rows->num_tokens());
  if (known) settled(sessions).catch_up(*rows);
  return known;
}
int evo_sessions_missed(Sessions* sessions, const TextIndexes* texts, const TokenRows* rows, int32_t* missed) {
  const int known = evo_sessions_know(sessions, rows->all_tokens, rows->num_tokens());
  if (!known) return known;
  settled(sessions).find_missed(*rows, missed);
  for (int i = 0; i < rows->count; ++i) {
    if (rows->rows[i].text >= 0) texts->of(rows->rows[i].text).extend(rows->tokens(i), rows->size(i));
  }
  return known;
}
void evo_sessions_learn(Sessions* sessions, const Lesson* lesson, int in_background) {
  settled(sessions).learn(*lesson, in_background != 0);
}

// The writes to tails since the last call: they are valid until the next call that makes some.
const TailWrite* evo_sessions_take_writes(Sessions* sessions, int* count) {
  thread_local std::vector<TailWrite> taken;
  taken.clear();
  taken.swap(settled(sessions).writes());
  *count = static_cast<int>(taken.size());
  return taken.data();
}

// The tokens [places] of a tail, the most worth keeping first; returns how many.
int evo_sessions_tail(Sessions* sessions, int session, int32_t* tokens) {
  const ArcTail tail = settled(sessions).tail(session);
  tail.contents(tokens);
  return tail.size();
}

SessionCounts* evo_sessions_counts(Sessions* sessions, int session) { return &settled(sessions).counts(session); }
SessionState* evo_sessions_state(Sessions* sessions, int session) { return &settled(sessions).state(session); }
float* evo_sessions_weights(Sessions* sessions, int session) { return settled(sessions).weights(session); }
float* evo_sessions_unigrams(Sessions* sessions, int session) { return settled(sessions).unigrams(session); }
ContextTable evo_sessions_ngrams(Sessions* sessions, int session, int order) {
  return order == 2 ? settled(sessions).bigrams(session) : settled(sessions).trigrams(session);
}

// After the session's last two tokens; see Sessions::followers.
void evo_sessions_followers(Sessions* sessions, int session, int order, int32_t* tokens, float* values) {
  const SessionState& known = settled(sessions).state(session);
  const int64_t context[2] = {known.last[0], known.last[1]};
  sessions->followers(session, order, context, tokens, values);
}

// Drafts of another step begin; returns the writes that there are before it.
const TailWrite* evo_sessions_begin_drafts(Sessions* sessions, int* count) {
  settled(sessions).begin_drafts();
  return evo_sessions_take_writes(sessions, count);
}
// Scores the candidates, or returns how many have been included whose logits are not known yet.
int evo_sessions_include(Sessions* sessions, const TextIndexes* texts, DraftStep* step) {
  include_repeats(settled(sessions), *texts, *step);
  if (step->num_included == 0) score(*sessions, *step);
  return step->num_included;
}
// Scores them then; included [num_included]: these logits.
void evo_sessions_score(Sessions* sessions, const DraftStep* step, const float* included) {
  set_included(*step, included);
  score(settled(sessions), *step);
}
// Drafts of a GPU, whose rows are of these sessions (-1: of none) and so long; one for each session at most.
void evo_sessions_take_drafts(Sessions* sessions, const ScoredRounds* scored, int rows, const int32_t* slots,
                              const int32_t* lengths) {
  settled(sessions).rounds().take(*scored);
  for (int row = 0; row < rows; ++row) {
    for (int round = 0; slots[row] >= 0 && round < lengths[row]; ++round) sessions->take_row(slots[row], round, row);
  }
}

TextIndexes* evo_texts_new(int slots, int capacity) { return new TextIndexes(slots, capacity); }
void evo_texts_free(TextIndexes* texts) { delete texts; }
int64_t evo_texts_bytes(const TextIndexes* texts) { return texts->num_bytes(); }
TextIndex evo_texts_arrays(const TextIndexes* texts) { return texts->of(0); }
void evo_texts_clear(TextIndexes* texts, int slot) { texts->clear(slot); }

void evo_texts_extend(const TextIndexes* texts, const TokenRows* rows) {
  for (int i = 0; i < rows->count; ++i) texts->of(rows->rows[i].slot).extend(rows->tokens(i), rows->size(i));
}

// copies [rows][most], lengths [rows]: see TextIndex::copy_longest.
void evo_texts_copy(const TextIndexes* texts, int rows, const int32_t* slots, int most, int32_t* copies,
                    int32_t* lengths) {
  for (int i = 0; i < rows; ++i) {
    lengths[i] = texts->of(slots[i]).copy_longest(copies + static_cast<size_t>(i) * most, most);
  }
}

// As TextIndex::find.
int evo_texts_find(const TextIndexes* texts, int slot, const int32_t* after, int count, int32_t* tokens,
                   int32_t* lengths) {
  return texts->of(slot).find(after, count, tokens, lengths);
}

}  // extern "C"

#include "sessions.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

namespace evospec {

namespace {

constexpr double kMaxUnit = 1e30;
constexpr int kMaxEdges = 128;  // of a token, in the graph and in a tenant's texts
constexpr float kGeneralWeight = 8.0f;  // the general graph counts as much as so many of a tenant's tokens

int64_t pair_of(int64_t two_ago, int64_t one_ago) { return two_ago << 31 | one_ago; }

struct TripleHash {
  size_t operator()(const std::pair<int64_t, int32_t>& triple) const {
    return static_cast<size_t>((triple.first * 0x9E3779B97F4A7C15u) ^ static_cast<uint64_t>(triple.second));
  }
};

}  // namespace

Sessions::Sessions(const SessionOptions& options)
    : options_(options),
      in_core_(options.in_core, options.in_core + options.vocab),
      unigrams_(options.sessions, options.vocab),
      weights_(options.sessions, kFeatures),
      bigrams_(options.sessions, options.bigram_rows, options.bigram_width),
      trigrams_(options.sessions, options.trigram_rows, options.trigram_width),
      tenants_(options.tenants, options.tenant_rows, options.tenant_width),
      states_(options.sessions, 1),
      counts_(options.sessions, 1),
      tails_(options.sessions, options.places, options.only_recency != 0),
      sources_(options.sessions, options.places),
      named_in_(options.vocab) {
  if (options.graph.offsets == nullptr) return;
  worths_.resize(options.graph.offsets[options.vocab]);
  for (size_t i = 0; i < worths_.size(); ++i) worths_[i] = kGeneralWeight * std::exp(options.graph.log_probs[i]);
}

size_t Sessions::num_bytes() const {
  return unigrams_.num_bytes() + bigrams_.num_bytes() + trigrams_.num_bytes() + tails_.num_bytes();
}

void Sessions::clear(int session, const float* weights) {
  unigrams_.fill(session, 0.0f);
  bigrams_.clear(session);
  trigrams_.clear(session);
  tail(session).clear();
  std::copy_n(weights, kFeatures, weights_.of(session));
  state(session) = {1.0, 0.0, {-1, -1}, 0, 0, 0, 0};
  counts(session) = {};
}

void Sessions::begin(int session, const std::vector<std::vector<int32_t>>& sources) {
  const std::vector<int32_t>& prompt = sources[0];
  count_prompt(session, prompt);
  SessionState& known = state(session);
  for (const int32_t token : prompt) known.last[0] = known.last[1], known.last[1] = token;
  if (options_.places == 0) return;

  std::vector<std::vector<int32_t>> chosen;
  Names taken(*this);
  size_t left = tail(session).room();
  const auto choose = [&](auto first, auto last) {
    std::vector<int32_t>& of_source = chosen.emplace_back();
    for (; first != last && left > 0; ++first) {
      if (!is_outside(*first) || !taken.is_new(*first)) continue;
      of_source.push_back(*first);
      --left;
    }
  };
  const size_t recent = options_.in_context ? std::min<size_t>(prompt.size(), kMaxPromptTokens) : 0;
  choose(prompt.rbegin(), prompt.rbegin() + recent);
  for (size_t i = 1; i < sources.size(); ++i) choose(sources[i].begin(), sources[i].end());
  constexpr Source kOrder[] = {kContext, kSnapshot, kTenant};
  for (size_t i = chosen.size(); i-- > 0;) {  // what comes last is kept longest
    insert(session, chosen[i].data(), chosen[i].size(), kOrder[i], tail(session).room());
  }
}

int Sessions::insert(int session, const int32_t* tokens, size_t count, Source source, int limit) {
  if (options_.places == 0 || limit <= 0) return 0;
  ArcTail own = tail(session);
  std::vector<int32_t> named;
  Names seen(*this);
  for (size_t i = 0; i < count; ++i) {
    if (!is_outside(tokens[i]) || !seen.is_new(tokens[i])) continue;
    if (own.place_of(tokens[i]) < 0 && --limit < 0) break;
    named.push_back(tokens[i]);
  }
  if (named.empty()) return 0;
  const size_t before = writes_.size();
  own.insert(named, writes_);
  for (size_t i = before; i < writes_.size(); ++i) sources_.of(session)[writes_[i].place] = source;
  const int inserted = static_cast<int>(writes_.size() - before);
  counts(session).insertions[source] += inserted;
  return inserted;
}

std::vector<int32_t> Sessions::outside(const int32_t* tokens, size_t count) const {
  std::vector<int32_t> found;
  std::copy_if(tokens, tokens + count, std::back_inserter(found), [&](int32_t token) { return is_outside(token); });
  return found;
}

// Counts tokens, single and after the two before them.
void Sessions::count(int session, const int32_t* tokens, size_t count, const int32_t before[2]) {
  SessionState& known = state(session);
  float* const unigrams = unigrams_.of(session);
  const ContextTable bigrams = bigrams_.of(session), trigrams = trigrams_.of(session);
  int64_t two_ago = before[0], one_ago = before[1];
  for (size_t i = 0; i < count; ++i) {
    known.unit *= options_.growth;
    unigrams[tokens[i]] = static_cast<float>(unigrams[tokens[i]] + known.unit);
    if (one_ago >= 0) bigrams.add(one_ago, tokens[i], known.unit);
    if (one_ago >= 0 && two_ago >= 0) trigrams.add(pair_of(two_ago, one_ago), tokens[i], known.unit);
    two_ago = one_ago;
    one_ago = tokens[i];
    if (known.unit > kMaxUnit) rescale(session);
  }
  counts(session).num_counted += count;
}

void Sessions::rescale(int session) {
  const float factor = static_cast<float>(1.0 / state(session).unit);
  float* const unigrams = unigrams_.of(session);
  for (int i = 0; i < options_.vocab; ++i) unigrams[i] *= factor;
  bigrams_.scale(session, factor);
  trigrams_.scale(session, factor);
  state(session).unit = 1.0;
}

// Most of a conversation's prompt is its earlier turns, sent once more. So where the session has a past, triples that it
// knows are not counted again.
void Sessions::count_prompt(int session, const std::vector<int32_t>& prompt) {
  constexpr int32_t kNone[2] = {-1, -1};
  const size_t size = std::min<size_t>(prompt.size(), kMaxPromptTokens);
  const int32_t* const recent = prompt.data() + prompt.size() - size;
  if (counts(session).num_counted == 0) return count(session, recent, size, kNone);
  // Known by the past, not by this prompt: all are looked up before any is counted.
  std::vector<bool> is_known(size);
  for (size_t i = 2; i < size; ++i) {
    is_known[i] = trigrams_.of(session).has(pair_of(recent[i - 2], recent[i - 1]), recent[i]);
  }
  std::unordered_set<std::pair<int64_t, int32_t>, TripleHash> counted;
  for (size_t i = 2; i < size; ++i) {
    const auto triple = std::make_pair(pair_of(recent[i - 2], recent[i - 1]), recent[i]);
    if (!is_known[i] && counted.insert(triple).second) count(session, recent + i, 1, recent + i - 2);
  }
}

// Takes tokens that the session goes on with, before anything enters its tail because of them.
void Sessions::read(int session, int tenant, const int32_t* tokens, size_t size) {
  SessionState& known = state(session);
  count(session, tokens, size, known.last);
  counts(session).num_read += size;
  if (tenant >= 0) {
    const ContextTable pairs = tenants_.of(tenant);
    int32_t before = known.last[1];
    for (size_t i = 0; i < size; before = tokens[i++]) {
      if (before >= 0) pairs.add(before, tokens[i], 1.0);
    }
  }
  for (size_t i = 0; i < size; ++i) known.last[0] = known.last[1], known.last[1] = tokens[i];
  if (options_.places > 0) tail(session).touch(outside(tokens, size));
}

void Sessions::catch_up(const TokenRows& rows) {
  for (int row = 0; row < rows.rows; ++row) {
    const int32_t* const tokens = rows.tokens + rows.begins[row];
    const size_t size = rows.begins[row + 1] - rows.begins[row];
    const int session = rows.sessions[row];
    read(session, rows.tenants == nullptr ? -1 : rows.tenants[row], tokens, size);
    if (options_.places == 0 || !options_.in_context) continue;
    // The latest first, where there is room or by the usual few.
    std::vector<int32_t> latest(tokens + size - std::min<size_t>(size, kMaxPromptTokens), tokens + size);
    std::reverse(latest.begin(), latest.end());
    insert(session, latest.data(), latest.size(), kContext, std::max(tail(session).room(), kMaxInsertions));
  }
}

void Sessions::begin_drafts() {
  for (const int32_t session : drafting_) state(session).num_drafted = 0;
  drafting_.clear();
}

int Sessions::take_row(int session, int round, int row) {
  SessionState& known = state(session);
  if (round == 0) {
    known.row = row;
    drafting_.push_back(session);
  }
  known.num_drafted = round + 1;
  return known.row;
}

void Sessions::find_missed(const TokenRows& rows, int32_t* missed) {
  for (int row = 0; row < rows.rows; ++row) {
    const int session = rows.sessions[row], begin = rows.begins[row], size = rows.begins[row + 1] - begin;
    SessionState& known = state(session);
    known.missed = 0;
    missed[row] = -1;
    for (int i = 0; i < size; ++i) {
      const int32_t token = rows.tokens[begin + i];
      if (!is_outside(token) || (options_.places > 0 && tail(session).place_of(token) >= 0)) continue;
      known.missed |= 1u << std::min(i, 31);
      if (missed[row] < 0) missed[row] = i;
    }
  }
}

void Sessions::learn(const Lesson& lesson, bool in_background) {
  if (in_background) return background_.post([this, lesson] { learn_step(lesson); });
  learn_step(lesson);
}

void Sessions::learn_step(const Lesson& lesson) {
  const TokenRows& rows = lesson.rows;
  for (int row = 0; row < rows.rows; ++row) {
    const int begin = rows.begins[row], size = rows.begins[row + 1] - begin;
    const int reached = std::min({size, lesson.num_drafts[row], state(rows.sessions[row]).num_drafted});
    learn_prior(rows.sessions[row], rows.tokens + begin, reached);
  }
  for (int row = 0; row < rows.rows; ++row) follow(lesson, row);
  const int32_t* likely = lesson.likely;
  for (int i = 0; i < lesson.num_chosen; ++i) {
    const int row = lesson.chosen[i], begin = rows.begins[row], size = rows.begins[row + 1] - begin;
    const int tenant = rows.tenants == nullptr ? -1 : rows.tenants[row];
    retrieve(rows.sessions[row], tenant, rows.tokens + begin, size, likely, lesson.k);
    likely += static_cast<size_t>(size) * lesson.k;
  }
}

// A session goes on with the tokens that it has got.
void Sessions::follow(const Lesson& lesson, int row) {
  const TokenRows& rows = lesson.rows;
  const int session = rows.sessions[row], size = rows.begins[row + 1] - rows.begins[row];
  const int32_t* const tokens = rows.tokens + rows.begins[row];
  read(session, rows.tenants == nullptr ? -1 : rows.tenants[row], tokens, size);
  SessionState& known = state(session);
  SessionCounts& counted = counts(session);
  for (int i = 0; i < std::min(size, lesson.num_accepted[row]); ++i) {
    const int place = options_.places > 0 && is_outside(tokens[i]) ? tail(session).place_of(tokens[i]) : -1;
    if (place >= 0) ++counted.hits[sources_.of(session)[place]];
  }
  counted.verified += size;
  counted.covered += size - __builtin_popcount(known.missed);
  counted.events += known.missed != 0;
  known.left = kMaxInsertions;
  if (options_.in_context) known.left -= insert(session, tokens, size, kContext, kMaxInsertions);
}

// What the target thought likely where a session's tokens were chosen enters its tail, and what follows that by the graph
// where one of them could not have been drafted. likely [count][k], the best first.
void Sessions::retrieve(int session, int tenant, const int32_t* tokens, int count, const int32_t* likely, int k) {
  std::vector<int32_t> wanted, seeds, near;
  SessionState& known = state(session);
  const auto is_missed = [&](int i) { return (known.missed >> std::min(i, 31) & 1) != 0; };
  for (int i = 0; i < count; ++i) {
    if (is_missed(i)) seeds.push_back(tokens[i]);
  }
  for (int rank = 0; rank < k; ++rank) {  // the best of each position first
    for (int i = 0; i < count; ++i) {
      const int32_t token = likely[static_cast<size_t>(i) * k + rank];
      wanted.push_back(token);
      if (is_missed(i)) seeds.push_back(token);
    }
  }
  known.left -= insert(session, wanted.data(), wanted.size(), kTarget, known.left);
  if (known.missed == 0 || tenant < 0) return;
  Names asked(*this);
  for (const int32_t seed : seeds) {
    if (asked.is_new(seed)) neighbours(tenant, seed, near);
  }
  insert(session, near.data(), near.size(), kGraph, known.left);
}

// Appends what most likely follows a token: by the tenant's own texts, with the general graph as so many tokens of them.
void Sessions::neighbours(int tenant, int32_t token, std::vector<int32_t>& out) {
  const Graph& graph = options_.graph;
  const int64_t begin = graph.offsets == nullptr ? 0 : graph.offsets[token];
  const int64_t end = graph.offsets == nullptr ? 0 : graph.offsets[token + 1];
  const ContextTable own = tenants_.of(tenant);
  const int64_t row = own.find(token);
  if (row < 0) {  // in order already
    out.insert(out.end(), graph.tokens + begin, graph.tokens + std::min(end, begin + kNeighbours));
    return;
  }
  std::pair<float, int32_t> worth[kMaxEdges];  // negative, so that the greatest comes first, of equals the least token
  int count = 0;
  for (int64_t i = begin; i < end && count < kMaxEdges; ++i) worth[count++] = {-worths_[i], graph.tokens[i]};
  const int of_graph = count;
  for (int64_t i = row * own.width; i < (row + 1) * own.width; ++i) {
    if (own.tokens[i] < 0) continue;
    int at = 0;
    while (at < of_graph && worth[at].second != own.tokens[i]) ++at;
    if (at < of_graph) {
      worth[at].first -= own.counts[i];
    } else if (count < kMaxEdges) {
      worth[count++] = {-own.counts[i], own.tokens[i]};
    }
  }
  const int wanted = std::min(count, kNeighbours);
  std::partial_sort(worth, worth + wanted, worth + count);
  for (int i = 0; i < wanted; ++i) out.push_back(worth[i].second);
}

}  // namespace evospec

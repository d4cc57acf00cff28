#include "sessions.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace evospec {

namespace {

constexpr double kMaxUnit = 1e30;
constexpr float kGeneralWeight = 8.0f;  // the general graph counts as much as so many of a tenant's tokens

int64_t pair_of(int64_t two_ago, int64_t one_ago) { return two_ago << 31 | one_ago; }

// The places of the last tokens of triples, of equal ones the first, ascending. They are sorted, which no text makes slow.
std::vector<int32_t> ends_of_triples(const int32_t* tokens, int32_t size) {
  std::vector<std::tuple<int64_t, int32_t, int32_t>> all;  // the pair, what follows it, and where
  for (int32_t i = 2; i < size; ++i) all.emplace_back(pair_of(tokens[i - 2], tokens[i - 1]), tokens[i], i);
  std::sort(all.begin(), all.end());
  const auto are_equal = [](const auto& a, const auto& b) {
    return std::get<0>(a) == std::get<0>(b) && std::get<1>(a) == std::get<1>(b);
  };
  all.erase(std::unique(all.begin(), all.end(), are_equal), all.end());
  std::vector<int32_t> places;
  for (const auto& triple : all) places.push_back(std::get<2>(triple));
  std::sort(places.begin(), places.end());
  return places;
}

}  // namespace

Sessions::Sessions(const SessionOptions& options)
    : options_(options),
      in_core_(options.in_core, options.in_core + options.vocab),
      unigrams_(options.sessions, options.vocab),
      weights_(options.sessions, kFeatures),
      counted_(options.sessions, 1),
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
  return unigrams_.num_bytes() + counted_.num_bytes() + bigrams_.num_bytes() + trigrams_.num_bytes() + tails_.num_bytes();
}

void Sessions::clear(int session, const float* weights) {
  unigrams_.fill(session, 0.0f);
  *counted_.of(session) = {};
  bigrams_.clear(session);
  trigrams_.clear(session);
  tail(session).clear();
  std::copy_n(weights, kFeatures, weights_.of(session));
  state(session) = {1.0, 0.0, {-1, -1}, 0, 0, 0, 0};
  counts(session) = {};
}

void Sessions::begin(int session, const std::vector<std::vector<int32_t>>& sources) {
  const std::vector<int32_t>& prompt = sources[0];
  for (int token = 0; counts(session).num_counted > 0 && token < options_.vocab; ++token) {
    if (unigrams(session)[token] > 0.0f) counted_.of(session)->add(token);  // those of a restored session
  }
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
    counted_.of(session)->add(tokens[i]);
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
  std::vector<int32_t> ends = ends_of_triples(recent, static_cast<int32_t>(size));
  std::erase_if(ends, [&](int32_t i) {
    return trigrams_.of(session).has(pair_of(recent[i - 2], recent[i - 1]), recent[i]);
  });
  for (const int32_t i : ends) count(session, recent + i, 1, recent + i - 2);
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
  for (int row = 0; row < rows.count; ++row) {
    const int32_t* const tokens = rows.tokens(row);
    const size_t size = rows.size(row);
    const int session = rows.rows[row].slot;
    read(session, rows.rows[row].tenant, tokens, size);
    if (options_.places == 0 || !options_.in_context) continue;
    // The latest first, where there is room or by the usual few.
    std::vector<int32_t> latest(tokens + size - std::min<size_t>(size, kMaxPromptTokens), tokens + size);
    std::reverse(latest.begin(), latest.end());
    insert(session, latest.data(), latest.size(), kContext, std::max(tail(session).room(), kMaxInsertions));
  }
}

}  // namespace evospec

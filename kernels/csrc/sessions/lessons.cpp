// What a verified step teaches a session: its counts go on, its prior learns, and tokens enter its tail.
#include <algorithm>

#include "sessions.h"

namespace evospec {

namespace {

constexpr int kMaxEdges = 128;  // of a token, in the graph and in a tenant's texts

}  // namespace

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
  for (int row = 0; row < rows.count; ++row) {
    const int session = rows.rows[row].slot, size = rows.size(row);
    SessionState& known = state(session);
    known.missed = 0;
    missed[row] = -1;
    for (int i = 0; i < size; ++i) {
      const int32_t token = rows.tokens(row)[i];
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
  for (int row = 0; row < rows.count; ++row) {
    const int session = rows.rows[row].slot;
    const int reached = std::min({rows.size(row), rows.rows[row].num_drafts, state(session).num_drafted});
    learn_prior(session, rows.tokens(row), reached);
  }
  for (int row = 0; row < rows.count; ++row) follow(rows.rows[row], rows.tokens(row), rows.size(row));
  const int32_t* likely = lesson.likely;
  for (int i = 0; i < lesson.num_chosen; ++i) {
    const int row = lesson.chosen[i], size = rows.size(row);
    retrieve(rows.rows[row].slot, rows.rows[row].tenant, rows.tokens(row), size, likely, lesson.k);
    likely += static_cast<size_t>(size) * lesson.k;
  }
}

// A session goes on with the tokens that it has got.
void Sessions::follow(const TokenRow& row, const int32_t* tokens, int size) {
  const int session = row.slot;
  read(session, row.tenant, tokens, size);
  SessionState& known = state(session);
  SessionCounts& counted = counts(session);
  for (int i = 0; i < std::min(size, row.num_accepted); ++i) {
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

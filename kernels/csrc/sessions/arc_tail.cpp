#include "arc_tail.h"

#include <algorithm>

#include "scattered.h"

namespace evospec {

namespace {

// Residents and ghosts of each kind, one of each more in passing, and the lists' ends.
constexpr int nodes_for(int places) { return 3 * places + 2 + 4; }

int buckets_for(int places) {
  int buckets = 16;
  while (buckets < 2 * nodes_for(places)) buckets *= 2;
  return buckets;
}

}  // namespace

void ArcTail::clear() {
  std::fill_n(table_, buckets_, -1);
  *state_ = {};
  state_->target = places_ / 2.0;
  state_->num_nodes = kLists;
  state_->free_node = -1;
  for (int32_t list = 0; list < kLists; ++list) nodes_[list] = {-1, list, list, -1, list, 0};
}

int32_t ArcTail::bucket_of(int32_t token) const {
  int32_t at = static_cast<int32_t>(scattered(token, factor_) & (buckets_ - 1));
  while (table_[at] >= 0 && nodes_[table_[at]].token != token) at = (at + 1) & (buckets_ - 1);
  return at;
}

int32_t ArcTail::find(int32_t token) const { return table_[bucket_of(token)]; }

int ArcTail::place_of(int32_t token) const {
  const int32_t node = find(token);
  return is_resident(node) ? nodes_[node].place : -1;
}

int32_t ArcTail::add_node(int32_t token) {
  int32_t node = state_->free_node;
  if (node < 0) {
    node = state_->num_nodes++;
  } else {
    state_->free_node = nodes_[node].next;
  }
  nodes_[node] = {token, -1, -1, -1, -1, 0};
  table_[bucket_of(token)] = node;
  return node;
}

void ArcTail::remove_node(int32_t node) {
  unlink(node);
  int32_t hole = bucket_of(nodes_[node].token);
  table_[hole] = -1;
  // Whatever comes behind the hole may have been pushed there by what is gone.
  for (int32_t at = (hole + 1) & (buckets_ - 1); table_[at] >= 0; at = (at + 1) & (buckets_ - 1)) {
    const int32_t moved = table_[at];
    table_[at] = -1;
    table_[bucket_of(nodes_[moved].token)] = moved;
  }
  nodes_[node].next = state_->free_node;
  state_->free_node = node;
}

void ArcTail::link(int32_t node, int list) {
  ArcNode& end = nodes_[list];
  nodes_[node].list = list;
  nodes_[node].previous = end.previous;
  nodes_[node].next = list;
  nodes_[end.previous].next = node;
  end.previous = node;
  ++state_->sizes[list];
}

void ArcTail::unlink(int32_t node) {
  nodes_[nodes_[node].previous].next = nodes_[node].next;
  nodes_[nodes_[node].next].previous = nodes_[node].previous;
  --state_->sizes[nodes_[node].list];
}

void ArcTail::refresh(int32_t node, int list) {
  unlink(node);
  link(node, list);
}

bool ArcTail::may_go(int32_t node) const {
  return state_->step - since_[nodes_[node].place] >= kMinResidency && nodes_[node].named_in != state_->insertion;
}

// Moves the target towards the list whose ghost is wanted, faster if its ghosts are the fewer.
void ArcTail::adapt(int32_t ghost) {
  if (ghost < 0 || state_->num_events <= kFixedEvents) return;
  const double recent = state_->sizes[kRecentGhosts], frequent = state_->sizes[kFrequentGhosts];
  if (nodes_[ghost].list == kRecentGhosts) {
    state_->target = std::min(state_->target + std::max(frequent / recent, 1.0), static_cast<double>(places_));
  } else {
    state_->target = std::max(state_->target - std::max(recent / frequent, 1.0), 0.0);
  }
}

// Drops a token for another, whose ghost is given (-1: it has none). Returns the place; -1: none may go.
int32_t ArcTail::evict_for(int32_t ghost) {
  adapt(ghost);
  const bool was_frequent = ghost >= 0 && nodes_[ghost].list == kFrequentGhosts;
  const int32_t num_recent = state_->sizes[kRecent];
  const bool from_recent = num_recent > state_->target || (was_frequent && num_recent >= state_->target);
  for (int i = 0; i < 2; ++i) {
    const int list = (i == 0) == from_recent ? kRecent : kFrequent, ghosts = list + kRecentGhosts;
    int32_t victim = oldest(list);
    while (victim != list && !may_go(victim)) victim = nodes_[victim].next;
    if (victim == list) continue;
    const int32_t place = nodes_[victim].place;
    refresh(victim, ghosts);
    if (only_recency_ || state_->sizes[ghosts] > places_) remove_node(oldest(ghosts));
    return place;
  }
  return -1;
}

void ArcTail::insert(const std::vector<int32_t>& named, std::vector<TailWrite>& writes) {
  ++state_->insertion;
  bool is_event = false;
  for (const int32_t token : named) {
    const int32_t node = find(token);
    if (node >= 0) nodes_[node].named_in = state_->insertion;
    is_event |= !is_resident(node);
  }
  state_->num_events += is_event;
  for (const int32_t token : named) {
    int32_t node = find(token);
    if (is_resident(node)) continue;
    const int32_t place = room() > 0 ? size() : evict_for(node);
    if (place < 0) break;
    node = find(token);  // a ghost may have been forgotten to make room for another
    const bool was_ghost = node >= 0;
    if (was_ghost) {
      unlink(node);
    } else {
      node = add_node(token);
    }
    link(node, was_ghost ? kFrequent : kRecent);
    nodes_[node].place = place;
    nodes_[node].named_in = state_->insertion;
    since_[place] = state_->step;
    writes.push_back({session_, place, token});
  }
  for (auto token = named.rbegin(); token != named.rend(); ++token) {  // so that the most wanted is the most recent
    const int32_t node = find(*token);
    if (is_resident(node)) refresh(node, nodes_[node].list);
  }
}

void ArcTail::touch(const std::vector<int32_t>& tokens) {
  ++state_->step;
  for (const int32_t token : tokens) {
    const int32_t node = find(token);
    if (is_resident(node)) refresh(node, only_recency_ ? kRecent : kFrequent);
  }
}

void ArcTail::contents(int32_t* tokens) const {
  for (const int list : {kFrequent, kRecent}) {
    for (int32_t node = nodes_[list].previous; node != list; node = nodes_[node].previous) *tokens++ = nodes_[node].token;
  }
}

ArcTails::ArcTails(int sessions, int places, bool only_recency)
    : places_(places),
      buckets_(buckets_for(places)),
      factor_(random_factor()),
      only_recency_(only_recency),
      since_(sessions, places),
      nodes_(sessions, nodes_for(places)),
      table_(sessions, buckets_),
      states_(sessions, 1) {}

ArcTail ArcTails::of(int session) const {
  return {session,           places_,            buckets_,           factor_,           only_recency_,
          since_.of(session), nodes_.of(session), table_.of(session), states_.of(session)};
}

size_t ArcTails::num_bytes() const {
  return since_.num_bytes() + nodes_.num_bytes() + table_.num_bytes() + states_.num_bytes();
}

}  // namespace evospec

// Which tokens live in the tail of a session's draft vocabulary: ARC, as EvoSpec has it (arXiv 2605.27390).
//
// ARC (Megiddo and Modha, FAST 2003) keeps tokens that were retrieved (T1) apart from those that verification has
// produced (T2), each with a list of ghosts (B1, B2): as many tokens as there are places, which were evicted. A ghost that
// is wanted again moves the target size of T1, except in the first kFixedEvents insertions, and enters T2.
#pragma once

#include <cstdint>
#include <vector>

#include "slot_array.h"

namespace evospec {

// A place's new token; whatever was there is gone.
struct TailWrite {
  int32_t session, place, token;
};

struct ArcNode {
  int32_t token, previous, next;
  int32_t place;    // of a resident token
  int32_t list;     // T1, T2, B1 or B2
  uint32_t named_in;  // the last insertion that named it
};

struct ArcState {
  double target;       // how many places T1 should have
  int32_t sizes[4];    // of T1, T2, B1, B2
  int32_t num_events, step, num_nodes, free_node;
  uint32_t insertion;
};

// The tokens of one tail. A token keeps its place for as long as it stays.
class ArcTail {
 public:
  static constexpr int kMinResidency = 8;   // verified steps for which a new token cannot be evicted (the paper's)
  static constexpr int kFixedEvents = 50;   // insertions during which the target stays at half of the places (the paper's)

  // only_recency: LRU, with T1 alone and no ghosts, to be measured against.
  // factor: of the tokens' hashes.
  ArcTail(int session, int places, int buckets, uint64_t factor, bool only_recency, int32_t* since, ArcNode* nodes, int32_t* table, ArcState* state)
      : session_(session), places_(places), buckets_(buckets), factor_(factor), only_recency_(only_recency),
        since_(since), nodes_(nodes), table_(table), state_(state) {}

  void clear();
  int size() const { return state_->sizes[0] + state_->sizes[1]; }
  int room() const { return places_ - size(); }
  // The place of a token, -1: it is not resident.
  int place_of(int32_t token) const;

  // Tokens that retrieval wants, the most wanted first, none twice. Those that are resident already are refreshed. None
  // that is named evicts another that is named; what does not fit is left out. Appends to `writes`.
  void insert(const std::vector<int32_t>& named, std::vector<TailWrite>& writes);

  // Tokens that verification has produced. One call a verified step, be it empty: it is the clock of residency.
  void touch(const std::vector<int32_t>& tokens);

  // The tokens [size()], the most worth keeping first: inserted into an empty tail, they are in the same order.
  void contents(int32_t* tokens) const;

 private:
  enum List { kRecent, kFrequent, kRecentGhosts, kFrequentGhosts };
  static constexpr int kLists = 4;

  int32_t find(int32_t token) const;
  int32_t bucket_of(int32_t token) const;
  int32_t add_node(int32_t token);
  void remove_node(int32_t node);
  void link(int32_t node, int list);  // as the most recent
  void unlink(int32_t node);
  void refresh(int32_t node, int list);
  bool is_resident(int32_t node) const { return node >= 0 && nodes_[node].list <= kFrequent; }
  bool may_go(int32_t node) const;
  void adapt(int32_t ghost);
  int32_t evict_for(int32_t ghost);
  int32_t oldest(int list) const { return nodes_[list].next; }

  const int session_, places_, buckets_;
  const uint64_t factor_;
  const bool only_recency_;
  int32_t* const since_;  // [places]: the step in which each token came
  ArcNode* const nodes_;   // the first kLists are the lists' ends
  int32_t* const table_;   // [buckets]: nodes by token; -1: none
  ArcState* const state_;
};

// Tails for all sessions.
class ArcTails {
 public:
  ArcTails(int sessions, int places, bool only_recency);

  ArcTail of(int session) const;
  size_t num_bytes() const;

 private:
  int places_, buckets_;
  uint64_t factor_;
  bool only_recency_;
  SlotArray<int32_t> since_;
  SlotArray<ArcNode> nodes_;
  SlotArray<int32_t> table_;
  SlotArray<ArcState> states_;
};

}  // namespace evospec

// Chains of draft tokens: head, prior, choice and draft layer in turn, without Python between two tokens.
#pragma once

#include "decoder.h"
#include "sessions/sessions.h"
#include "tails.h"

namespace evospec {

constexpr int kConfidenceLevels = 16;  // level n: a probability of n/16 to (n + 1)/16 among the candidates

// A draft (EAGLE-3) and what its tokens are chosen from.
struct ChainModel {
  Decoder* layer;           // the draft's one layer
  const float* norm;        // its output norm, [hidden]
  int hidden;
  Matrix embedding, head;   // the target's, or the draft's own
  Matrix core;              // rows of the head that all sequences share
  const int32_t* core_ids;  // [core.n]: their tokens; null: 0 .. core.n - 1
  const int32_t* row_of;    // [vocab]: a token's row of the head, -1: it has none; null: the row of its number
  const TailSlabs* tails;   // null: none
  Sessions* sessions;        // null: none
  const TextIndexes* texts;  // null: repeats do not count
  const KvLayers* kv;       // of the layer
  int shift;                // a token's entry lies so many places before the token's own
  int norm_output;          // whether the draft's state is what its output norm gives, as in EAGLE-3.1
};

// T known tokens that the draft reads first, of S sequences: those of the chains, in their order, and further ones.
struct UnreadTokens {
  int tokens, sequences;
  const int32_t* token_ids;    // [T]
  const int32_t* positions;    // [T], places of their entries
  const int32_t* slots;        // [T], of their entries
  const int32_t* query_start;  // [S + 1]: the tokens of each; at least one
  const int32_t* seq_lens;     // [S]
  const int32_t* before;       // [T]: rows of g, each token's the one of the position before it
  const bf16* g;               // [..][hidden]
  const LoraRows* lora;        // null: none
};

// B sequences, the longest chain first; arrays of one entry a row.
struct ChainRows {
  int rows, max_length, max_blocks, candidates;  // candidates of each token that are looked at
  const int32_t* lengths;       // of the chains, 1 .. max_length
  const int32_t* positions;     // of the last known token; drafts follow
  const int32_t* block_tables;  // [S][max_blocks], the first are theirs
  const int32_t* slabs;         // the tail of each; null without tails
  const LoraRows* lora;         // null: none
  // How tokens are chosen; temperatures null: the best candidate, everywhere.
  const float* temperatures;
  const int64_t* seeds;
  const int32_t* top_k;
  const double *top_p, *min_p;
  const int32_t* sessions;  // whose prior each row has; -1: none. Null: no row has one
  const int32_t* texts;     // whose repeats; -1: none
  // When all chains end early; chances null: never. Everything is counted in tokens.
  const float* chances;       // [T][2][kConfidenceLevels]: that a tenant's greedy and sampled token is accepted
  const int32_t* tenants;     // [B]: the number of each one's tenant among the T
  const float* acceptance;    // [B][max_length]: of each place, before it is drafted, if those before it are accepted
  const float* verify_costs;  // [max_length]: of verifying one more token
  float draft_cost;           // of another token for each sequence
};

// What comes of it, step by step: [max_length][B] of each.
struct ChainOutputs {
  int32_t* tokens;
  bf16* hidden;        // [hidden] from which the token was chosen
  int32_t* confidence;  // level of the token; null where chains never end early
};

}  // namespace evospec

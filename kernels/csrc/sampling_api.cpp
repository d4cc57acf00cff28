// The C interface that kernels/native_sampling.py calls. `team` may be null: the calling thread alone.

#include "gumbel.h"
#include "penalties.h"
#include "rows.h"
#include "tails.h"
#include "topk.h"
#include "truncation.h"

using namespace evospec;

extern "C" {

void evo_gumbel_argmax(Team* team, const LogitRows* logits, const GumbelRows* how, int64_t* out) {
  gumbel_argmax(team, *logits, *how, out);
}

void evo_kept_thresholds(Team* team, const LogitRows* logits, const TruncationRows* limits, float* out) {
  kept_thresholds(team, *logits, *limits, out);
}

void evo_top_k(Team* team, const LogitRows* logits, int k, const int32_t* ids, float* values, int64_t* indices) {
  top_k(team, *logits, k, ids, values, indices);
}

void evo_log_probabilities(Team* team, const LogitRows* logits, const LogProbabilities* wanted) {
  log_probabilities(team, *logits, *wanted);
}

void evo_draft_top_k(Team* team, const LogitRows* core, const int32_t* core_ids, const TailSlabs* tails,
                     const TailQueries* queries, int k, float* values, int32_t* token_ids) {
  draft_top_k(team, *core, core_ids, *tails, *queries, k, values, token_ids);
}

void evo_penalize(float* logits, size_t stride, const SeenTokens* seen, float* before) {
  penalize(logits, stride, *seen, before);
}

void evo_put_back(float* logits, size_t stride, const SeenTokens* seen, const float* before) {
  put_back(logits, stride, *seen, before);
}

}  // extern "C"

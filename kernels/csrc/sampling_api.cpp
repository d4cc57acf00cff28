// The C interface that kernels/native_sampling.py calls. `team` may be null: the calling thread alone.

#include <cmath>

#include "gumbel.h"
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

void evo_draft_top_k(Team* team, const LogitRows* core, const int32_t* core_ids, const TailSlabs* tails,
                     const TailQueries* queries, int k, float* values, int32_t* token_ids) {
  draft_top_k(team, *core, core_ids, *tails, *queries, k, values, token_ids);
}

// out [rows] = log of the sum of exp(logit); -inf for a row of -inf.
void evo_logsumexp(Team* team, const LogitRows* logits, double* out) {
  for_each_item(team, logits->rows, static_cast<size_t>(logits->rows) * logits->columns, [&](int i) {
    const float *row = logits->row(i), highest = row_max(row, logits->columns);
    out[i] = std::isinf(highest) ? highest : highest + std::log(weight_sum(row, logits->columns, highest, 1.0f));
  });
}

}  // extern "C"

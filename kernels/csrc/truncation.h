// Where top-k, then top-p, then min-p cut a distribution off.
#pragma once

#include "rows.h"

namespace evospec {

struct TruncationRows {  // arrays of one entry a row
  const float* temperatures;  // 0 is greedy: nothing is cut off
  const int32_t* top_k;       // 0: off
  const double* top_p;        // 1: off
  const double* min_p;        // 0: off
};

// out [rows]: the smallest logit that is kept; -inf where nothing is cut off. Tokens that tie with it are kept too,
// and those that are not allowed count as -inf.
extern "C" void evo_kept_thresholds(Team* team, const LogitRows& logits, const TruncationRows& limits, float* out);

// The same of one row.
float kept_threshold(const LogitRows& logits, const TruncationRows& limits, int row);

}  // namespace evospec

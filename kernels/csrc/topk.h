// The largest logits of every row.
#pragma once

#include "rows.h"

namespace evospec {

// values, indices [rows][k], k <= columns: the k largest logits in descending order, equals by column. With `ids`
// [columns], indices are ids[column]. NaN counts as -inf.
void top_k(Team* team, const LogitRows& logits, int k, const int32_t* ids, float* values, int64_t* indices);

// Log-probabilities that are wanted, and where they go.
struct LogProbabilities {
  int k;                     // <= columns, or 0
  const int32_t* token_ids;  // [rows]: a token of each
  double* chosen;            // [rows]: its log-probability
  double* largest;           // [rows][k]: the largest of the row in descending order, equals by column
  int32_t* columns;          // [rows][k]: their tokens
};

void log_probabilities(Team* team, const LogitRows& logits, const LogProbabilities& wanted);

}  // namespace evospec

// The largest logits of every row.
#pragma once

#include "rows.h"

namespace evospec {

// values, indices [rows][k], k <= columns: the k largest logits in descending order, equals by column. With `ids`
// [columns], indices are ids[column]. NaN counts as -inf.
extern "C" void evo_top_k(Team* team, const LogitRows& logits, int k, const int32_t* ids, float* values, int64_t* indices);

}  // namespace evospec

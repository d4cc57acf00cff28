// The most likely token of every row.
#pragma once

#include "rows.h"

namespace evospec {

// out [rows] = the column of the largest logit, of equal ones the first. NaN counts as -inf; 0 where all are -inf.
void argmax(Team* team, const LogitRows& logits, int64_t* out);

}  // namespace evospec

// Logits of a vocabulary of which only a row's largest has to be right.
//
// All are estimated by a copy of the head that has 4 bits a weight: two thirds of the bytes. Those that may be the largest are
// then computed by the head itself, to the same bits as by `linear`. An estimate is wrong by the sum of many rounding errors
// times the numbers of a row. How far is bounded by eight of its standard deviations: were the errors independent and
// evenly spread, as rounding makes them, one in 10^15 would go further.
#pragma once

#include "linear.h"

namespace evospec {

struct ScreenedHead {
  Matrix head;      // kBf16 or kQ8
  Matrix estimate;  // kQ4, of the same shape
  const float* errors;  // [n padded to 32]: by how much an estimate may be wrong, for a row of length one
};

}  // namespace evospec

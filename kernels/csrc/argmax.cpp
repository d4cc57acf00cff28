#include "argmax.h"

#include <limits>
#include <vector>

namespace evospec {

namespace {

// Columns of a row that one thread takes at a time; and of a run whose maximum is found before anything is compared, so
// that the columns of only one run are looked at one by one.
constexpr int kPiece = 16384, kRun = 1024;

struct Largest {
  float value = -std::numeric_limits<float>::infinity();
  int column = 0;
};

Largest largest_of(const float* x, int n) {
  Largest best;
  for (int i = 0; i < n; i += kRun) {
    const float highest = row_max(x + i, std::min(kRun, n - i));
    if (highest > best.value) best = {highest, i};
  }
  if (best.value > -std::numeric_limits<float>::infinity()) {
    while (x[best.column] != best.value) ++best.column;
  }
  return best;
}

}  // namespace

void argmax(Team* team, const LogitRows& logits, int64_t* out) {
  const int pieces = (logits.columns + kPiece - 1) / kPiece;
  std::vector<Largest> best(static_cast<size_t>(logits.rows) * pieces);
  const size_t elements = static_cast<size_t>(logits.rows) * logits.columns;
  for_each_item(team, logits.rows * pieces, elements, [&](int item) {
    const int first = item % pieces * kPiece;
    best[item] = largest_of(logits.row(item / pieces) + first, std::min(kPiece, logits.columns - first));
    best[item].column += first;
  });
  for (int row = 0; row < logits.rows; ++row) {
    Largest choice;
    for (int p = 0; p < pieces; ++p) {
      const Largest& piece = best[static_cast<size_t>(row) * pieces + p];
      if (piece.value > choice.value) choice = piece;
    }
    out[row] = choice.column;
  }
}

}  // namespace evospec

#include "screened_head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "rows.h"

namespace evospec {

namespace {

constexpr float kDeviations = 8.0f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kRowsRoundedAtOnce = 64;

// The nearest codes of a row of weights.
void round_to_q4(const float* weights, int k, RowCodes& out) {
  for (int b = 0; b < k / kBlock; ++b, weights += kBlock) {
    const auto [least, most] = std::minmax_element(weights, weights + kBlock);
    const float scale = (*most - *least) / 15.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < kBlock; ++i) {
      const float code = (weights[i] - *least) * inverse;
      out.codes[b * kBlock + i] = code > 0.0f ? static_cast<uint8_t>(std::min(code, 15.0f) + 0.5f) : 0;
    }
    out.scales[2 * b] = out.scales[2 * b + 1] = scale;
    out.minima[b] = *least;
  }
}

// The largest of some logits, and its column: `begin` where none is a number.
struct Largest {
  float value = -kInfinity;
  int column;
};

Largest largest_in(const float* logits, int begin, int end) {
  Floats most = all(-kInfinity);
  Ints columns = all(begin);
  for_each_vector(logits, begin, end, [&](int i, Mask lanes, Floats x) {
    const Mask wins = lanes & more(x, most);
    if (wins == 0) return;
    most = choose(wins, x, most);
    columns = choose(wins, numbered_from(i), columns);
  });
  const float value = largest(most);
  return {value, smallest(equal(most, all(value)), columns)};
}

float length_of(const bf16* x, int k) {
  Floats squares = all(0.0f);
  for (int i = 0; i < k; i += 16) squares = multiply_add(load_bf16(x + i), load_bf16(x + i), squares);
  return std::sqrt(sum(squares));
}

// Those logits begin .. end - 1 of a row again that may reach `least`; `errors`: by how much an estimate may be wrong, by
// column, times `length`. A pair of groups lies within these columns or outside.
void compute_candidates(const Linear& op, const float* errors, int row, int begin, int end, float length, float least) {
  int done = -1;
  for_each_vector(static_cast<float*>(op.out) + static_cast<size_t>(row) * op.stride, begin, end,
                  [&](int i, Mask lanes, Floats estimates) {
    const Mask candidates = lanes & at_least(multiply_add(load(errors + i), all(length), estimates), all(least));
    const int pair = i / kPairColumns;
    if (candidates == 0 || pair == done) return;
    linear_pair(op, row, pair);
    done = pair;
  });
}

}  // namespace

// Fills the estimate's codes `data`, which are zeros, and errors.
extern "C" void evo_round_head(Team& team, const ScreenedHead& screened, uint8_t* data, float* errors) {
  const int k = screened.head.k;
  team.run([&](int) {
    std::vector<float> weights(k), rounded(k), scales(k / 16), minima(k / kBlock);
    std::vector<uint8_t> codes(k);
    RowCodes row_codes{kQ4, codes.data(), scales.data(), minima.data()};
    team.work_ranges(screened.head.n, kRowsRoundedAtOnce, [&](int begin, int end, int) {
      for (int row = begin; row < end; ++row) {
        unpack_row(screened.head, row, weights.data());
        round_to_q4(weights.data(), k, row_codes);
        pack_codes(data, k, row, row_codes);
        unpack_row(screened.estimate, row, rounded.data());
        double squares = 0.0;
        for (int i = 0; i < k; ++i) squares += std::pow(static_cast<double>(weights[i]) - rounded[i], 2);
        errors[row] = kDeviations * static_cast<float>(std::sqrt(squares / k));
      }
    });
  });
}

// out [rows][n] = the logits of x, bf16 [rows rounded up to a multiple of 16][k]: of each row the largest as it is, of all others
// that or the estimate, which is then less.
extern "C" void evo_screened_logits(Team& team, const ScreenedHead& screened, const bf16* x, int rows, float* out) {
  const int n = screened.head.n, k = screened.head.k, pieces = team.size();
  const int piece_pairs = (screened.head.num_pairs() + pieces - 1) / pieces, piece = piece_pairs * kPairColumns;
  const Linear op{&screened.head, x, rows, Epilogue::kStore, out, n, rows};
  Linear estimated = op;
  estimated.weight = &screened.estimate;
  std::vector<Largest> largest(static_cast<size_t>(rows) * pieces);
  std::vector<float> least(rows), lengths(rows);
  const auto in_pieces = [&](auto item) {
    team.work(rows * pieces, [&](int i) {
      const int begin = std::min(i % pieces * piece, n), end = std::min(begin + piece, n);
      item(i / pieces, begin, end, largest[i]);
    });
    team.barrier();
  };
  team.run([&](int) {
    linear(team, estimated);
    team.barrier();
    in_pieces([&](int row, int begin, int end, Largest& of_piece) {
      of_piece = largest_in(out + static_cast<size_t>(row) * n, begin, end);
    });
    team.work(rows, [&](int row) {
      const Largest* const first = &largest[static_cast<size_t>(row) * pieces];
      const auto less_than = [](const Largest& a, const Largest& b) { return a.value < b.value; };
      const int column = std::max_element(first, first + pieces, less_than)->column;
      linear_pair(op, row, column / kPairColumns);
      least[row] = out[static_cast<size_t>(row) * n + column];
      lengths[row] = length_of(x + static_cast<size_t>(row) * k, k);
    });
    team.barrier();
    in_pieces([&](int row, int begin, int end, Largest&) {
      compute_candidates(op, screened.errors, row, begin, end, lengths[row], least[row]);
    });
  });
}

}  // namespace evospec

// Repetition, presence and frequency penalties on tokens that were seen before.
#include <cstddef>
#include <cstdint>

namespace evospec {

namespace {

// Distinct tokens before some rows of logits, those of row rows[0] first, and of each row the prompt's tokens first.
struct SeenTokens {
  const int64_t* rows;
  const int64_t* ends;        // of each row's tokens
  const int64_t* num_prompt;  // how many of each row's tokens are the prompt's
  const double* penalties;    // [num_rows][3]: repetition, presence, frequency
  const int64_t* token_ids;   // columns that exist
  const int64_t* counts;      // occurrences in the output; 0: not seen, unless it is the prompt's
  int num_rows;
};

// visit(logit, i, row number) for each of the tokens.
template <typename Visit>
void for_each_token(float* logits, size_t stride, const SeenTokens& seen, Visit visit) {
  for (int64_t r = 0, i = 0; r < seen.num_rows; ++r) {
    float* const row = logits + seen.rows[r] * stride;
    for (; i < seen.ends[r]; ++i) visit(row[seen.token_ids[i]], i, r);
  }
}

}  // namespace

// In rows of `stride` floats. `before`: one value for each token, for evo_put_back.
extern "C" void evo_penalize(float* logits, size_t stride, const SeenTokens& seen, float* before) {
  for_each_token(logits, stride, seen, [&](float& logit, int64_t i, int64_t r) {
    before[i] = logit;
    const int64_t begin = r == 0 ? 0 : seen.ends[r - 1];
    if (seen.counts[i] <= 0 && i - begin >= seen.num_prompt[r]) return;
    const double* const penalties = seen.penalties + 3 * r;
    const float repetition = static_cast<float>(penalties[0]);
    const double subtracted = seen.counts[i] > 0 ? penalties[1] + penalties[2] * seen.counts[i] : 0.0;
    logit = (logit > 0.0f ? logit / repetition : logit * repetition) - static_cast<float>(subtracted);
  });
}

extern "C" void evo_put_back(float* logits, size_t stride, const SeenTokens& seen, const float* before) {
  for_each_token(logits, stride, seen, [&](float& logit, int64_t i, int64_t) { logit = before[i]; });
}

}  // namespace evospec

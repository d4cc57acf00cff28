#include "penalties.h"

namespace evospec {

namespace {

// visit(logit, i, row number) for each of the tokens.
template <typename Visit>
void for_each_token(float* logits, size_t stride, const SeenTokens& seen, Visit visit) {
  for (int64_t r = 0, i = 0; r < seen.num_rows; ++r) {
    float* const row = logits + seen.rows[r] * stride;
    for (; i < seen.ends[r]; ++i) visit(row[seen.token_ids[i]], i, r);
  }
}

}  // namespace

void penalize(float* logits, size_t stride, const SeenTokens& seen, float* before) {
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

void put_back(float* logits, size_t stride, const SeenTokens& seen, const float* before) {
  for_each_token(logits, stride, seen, [&](float& logit, int64_t i, int64_t) { logit = before[i]; });
}

}  // namespace evospec

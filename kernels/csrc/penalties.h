// Repetition, presence and frequency penalties on tokens that were seen before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace evospec {

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

// In rows of `stride` floats. `before`: one value for each token, for put_back.
void penalize(float* logits, size_t stride, const SeenTokens& seen, float* before);
void put_back(float* logits, size_t stride, const SeenTokens& seen, const float* before);

}  // namespace evospec

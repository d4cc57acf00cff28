// Sampling as argmax(logit / temperature + Gumbel noise); the noise is the hash that kernels/gumbel_argmax.py defines.
#pragma once

#include "truncation.h"

namespace evospec {

// How each row chooses; arrays of one entry a row.
struct GumbelRows {
  const int64_t* seeds;
  const int64_t* positions;
  const int32_t* token_ids;      // [rows][columns]: the tokens that the columns stand for; null: 0 .. columns - 1
  const float* temperatures;     // 0: the largest logit, without noise; null: everywhere
  const TruncationRows* limits;  // with the same temperatures; null: all tokens may be chosen
  uint8_t* undefined;            // out: 1 where a logit is NaN or +inf, else 0; null: nobody asks
};

// out [rows]: the choices; equal scores go to the lowest token id. NaN is never chosen.
extern "C" void evo_gumbel_argmax(Team* team, const LogitRows& logits, const GumbelRows& how, int64_t* out);

}  // namespace evospec

// A mixture of experts in place of a layer's MLP: each token goes through the few that its router scores highest.
#pragma once

#include <vector>

#include "linear.h"

namespace evospec {

struct Expert {
  Matrix gate_up, down;
};

struct Experts {
  const float* router;  // [count][hidden]; null: the layer has an MLP instead
  const float* router_bias;  // [count], or null
  const Expert* experts;
  int count, per_token;
  int normalized;  // whether the weights of a token's experts sum to one
};

// Buffers of a step's mixtures, one layer after the other.
class Mixture {
 public:
  // Before Team::run.
  void reserve(const Experts& experts, int tokens, int hidden, int intermediate);

  // residual [tokens][hidden] += what the experts make of x [tokens][hidden]. A token's result does not depend on the
  // others: its experts are added in their order. Inside Team::run, by all threads; ends with a barrier.
  void add(Team& team, const Experts& experts, Epilogue gate, const bf16* x, int tokens, int hidden, int intermediate,
           float* residual);

 private:
  void route(const Experts& experts, const bf16* x, int token, int hidden);
  void place(const Experts& experts, int tokens);

  std::vector<int32_t> chosen_, rows_;   // [tokens][per_token]: experts, ascending, and where their rows are
  std::vector<float> weights_;           // [tokens][per_token]
  std::vector<int32_t> starts_, counts_;  // of each expert's rows
  std::vector<bf16> x_, gated_;          // rows in order of their expert, which begin at whole tiles
  std::vector<float> out_;
};

}  // namespace evospec

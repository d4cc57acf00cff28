#include "experts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace evospec {

namespace {

constexpr int kTileRows = 32;

int padded(int rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

float dot(const bf16* x, const float* weights, int size) {
  Floats products = all(0.0f);
  for (int i = 0; i < size; i += 16) products = multiply_add(load_bf16(x + i), load(weights + i), products);
  return sum(products);
}

}  // namespace

void Mixture::reserve(const Experts& experts, int tokens, int hidden, int intermediate) {
  const size_t pairs = static_cast<size_t>(tokens) * experts.per_token;
  const size_t rows = pairs + std::min<size_t>(experts.count, pairs) * (kTileRows - 1);
  auto grow = [](auto& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  grow(chosen_, pairs), grow(rows_, pairs), grow(weights_, pairs);
  grow(starts_, experts.count), grow(counts_, experts.count);
  grow(x_, rows * hidden), grow(gated_, rows * intermediate), grow(out_, rows * hidden);
}

// The experts of a token, in ascending order, and what each is multiplied with.
void Mixture::route(const Experts& experts, const bf16* x, int token, int hidden) {
  thread_local std::vector<float> logits;
  thread_local std::vector<int32_t> order;
  logits.resize(experts.count), order.resize(experts.count);
  const bf16* row = x + static_cast<size_t>(token) * hidden;
  for (int e = 0; e < experts.count; ++e) {
    const float bias = experts.router_bias == nullptr ? 0.0f : experts.router_bias[e];
    const float logit = dot(row, experts.router + static_cast<size_t>(e) * hidden, hidden) + bias;
    logits[e] = std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;  // what is no number has no order
  }
  const int count = experts.per_token;
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int a, int b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  const float highest = logits[order[0]];
  float total = 0.0f;
  if (experts.normalized) {
    for (int i = 0; i < count; ++i) total += std::exp(logits[order[i]] - highest);
  } else {
    for (float logit : logits) total += std::exp(logit - highest);
  }
  std::sort(order.begin(), order.begin() + count);
  for (int i = 0; i < count; ++i) {
    const size_t pair = static_cast<size_t>(token) * count + i;
    chosen_[pair] = order[i];
    weights_[pair] = std::exp(logits[order[i]] - highest) / total;
  }
}

// Gives each pair of a token and an expert its row: those of one expert follow each other.
void Mixture::place(const Experts& experts, int tokens) {
  const int pairs = tokens * experts.per_token;
  std::fill_n(counts_.begin(), experts.count, 0);
  for (int pair = 0; pair < pairs; ++pair) rows_[pair] = counts_[chosen_[pair]]++;
  int start = 0;
  for (int e = 0; e < experts.count; ++e) {
    starts_[e] = start;
    start += padded(counts_[e]);
  }
  for (int pair = 0; pair < pairs; ++pair) rows_[pair] += starts_[chosen_[pair]];
}

void Mixture::add(Team& team, const Experts& experts, Epilogue gate, const bf16* x, int tokens, int hidden,
                  int intermediate, float* residual) {
  const int per_token = experts.per_token;
  team.work(tokens, [&](int token) { route(experts, x, token, hidden); });
  team.barrier();
  team.work(1, [&](int) { place(experts, tokens); });
  team.barrier();
  team.work(tokens * per_token, [&](int pair) {
    const bf16* row = x + static_cast<size_t>(pair / per_token) * hidden;
    std::copy_n(row, hidden, x_.data() + static_cast<size_t>(rows_[pair]) * hidden);
  });
  team.barrier();
  for (int e = 0; e < experts.count; ++e) {
    if (counts_[e] == 0) continue;
    const size_t start = starts_[e];
    bf16* gated = gated_.data() + start * intermediate;
    linear(team, {&experts.experts[e].gate_up, x_.data() + start * hidden, counts_[e], gate, gated, intermediate, counts_[e]});
    team.barrier();
    linear(team, {&experts.experts[e].down, gated, counts_[e], Epilogue::kStore, out_.data() + start * hidden, hidden, counts_[e]});
    team.barrier();
  }
  team.work(tokens, [&](int token) {
    float* out = residual + static_cast<size_t>(token) * hidden;
    for (int pair = token * per_token; pair < (token + 1) * per_token; ++pair) {
      const float* added = out_.data() + static_cast<size_t>(rows_[pair]) * hidden;
      const Floats weight = all(weights_[pair]);
      for (int i = 0; i < hidden; i += 16) store(out + i, multiply_add(weight, load(added + i), load(out + i)));
    }
  });
  team.barrier();
}

}  // namespace evospec

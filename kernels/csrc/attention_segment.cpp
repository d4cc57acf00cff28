#include "attention_segment.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

namespace evospec {

namespace {

// kChains: independent sums of a score, always as many: a row's bits must not depend on how many rows there are.
// kValueVectors: of 16 dimensions, whose weighted sums are kept in registers.
#ifdef __AVX512F__
constexpr int kChains = 4, kValueVectors = 4;  // a product takes many cycles, but starts every cycle
#else
constexpr int kChains = 1, kValueVectors = 1;
#endif
constexpr int kValueRows = 4;  // of as many rows

struct Scratch {
  alignas(64) float scores[kMaxRows][kSegment];
  alignas(64) bf16 weights[kMaxRows][kSegment];
  std::vector<bf16> q;  // [kMaxRows][head_dim], for tiles
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

// Scores of 16 keys for R rows; keys: [head_dim / 2][stride][2], already at the first of the 16.
template <int R>
void score_keys(const Rows& rows, const bf16* keys, int stride, int head_dim, int column, Scratch& local) {
  Floats acc[R][kChains];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kChains; ++c) acc[r][c] = all(0.0f);
  }
  for (int d = 0; d < head_dim; d += 2 * kChains) {
    for (int c = 0; c < kChains; ++c, keys += 2 * stride) {
      const Pairs k = load_pairs(keys);
      for (int r = 0; r < R; ++r) acc[r][c] = add_products(acc[r][c], k, broadcast_pair(rows.q[r] + d + 2 * c));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 1; c < kChains; ++c) acc[r][0] = acc[r][0] + acc[r][c];
    store(local.scores[r] + column, acc[r][0]);
  }
}

using ScoreKeys = void (*)(const Rows&, const bf16*, int, int, int, Scratch&);
constexpr auto kScoreKeys = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<ScoreKeys, sizeof...(R)>{score_keys<R + 1>...};
}(std::make_integer_sequence<int, kVectorRows>());

// sums[r][0 .. 16 V - 1] += weights[r] . values, for R rows and `count` tokens (whole blocks).
template <int R, int V>
void add_values(const bf16* weights, const Values& values, int count, float* sums) {
  const int dim = values.cache.head_dim, size = values.cache.block_size;
  Floats acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * dim + v * kLanes);
  }
  for (int c = 0; c < count; c += size) {
    const bf16* row = values.cache.value_head(values.blocks[c / size], values.head) + 2 * values.first;
    for (int i = 0; i < size; i += 2, row += 2 * dim) {
      for (int v = 0; v < V; ++v) {
        const Pairs value = load_pairs(row + v * 2 * kLanes);
        for (int r = 0; r < R; ++r) {
          acc[r][v] = add_products(acc[r][v], value, broadcast_pair(weights + r * kSegment + c + i));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(sums + r * dim + v * kLanes, acc[r][v]);
  }
}

using AddValues = void (*)(const bf16*, const Values&, int, float*);
template <int V>
constexpr AddValues kAddValues[] = {add_values<1, V>, add_values<2, V>, add_values<3, V>, add_values<4, V>};

// ---- for any number of rows ----

// Scores of 16 keys, and weighted values of a segment, for all rows.
void score(const Rows& rows, const bf16* keys, int stride, int head_dim, int column, Scratch& local) {
  if constexpr (kMayHaveAmx) {
    if (has_amx()) {
      score_key_tiles(local.q.data(), keys, stride, head_dim, local.scores[0] + column);
      return;
    }
  }
  kScoreKeys[rows.count - 1](rows, keys, stride, head_dim, column, local);
}

// begin: the column of the weights that belongs to the first of `blocks`.
void accumulate(const Rows& rows, const KvCache& cache, const int32_t* blocks, int head, int begin, int count,
                float* sums) {
  Scratch& local = scratch();
  const int dim = cache.head_dim;
  constexpr int kWide = kValueVectors * kLanes, kNarrow = std::min(kWide, 32);  // a head may end with 32 dimensions
  for (int d = 0, size; d < dim; d += size) {
    size = dim - d >= kWide ? kWide : kNarrow;
    const Values values{cache, blocks, head, d};
    if constexpr (kMayHaveAmx) {
      if (has_amx()) {
        add_value_tiles(size == kWide, local.weights[0] + begin, values, count, sums + d);
        continue;
      }
    }
    const AddValues* by_rows = size == kWide ? kAddValues<kValueVectors> : kAddValues<kNarrow / kLanes>;
    for (int r = 0; r < rows.count; r += kValueRows) {
      const AddValues add = by_rows[std::min(kValueRows, rows.count - r) - 1];
      add(local.weights[r] + begin, values, count, sums + r * dim + d);
    }
  }
}

// Masks all of the columns begin .. end - 1 but first .. limit - 1, and returns the largest score.
float mask_and_max(float* scores, int first, int limit, int begin, int end) {
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (int c = begin; c < std::min(first, end); ++c) scores[c] = minus_infinity;
  for (int c = std::max(limit, begin); c < end; ++c) scores[c] = minus_infinity;
  Floats most = all(minus_infinity);
  for (int c = begin; c < end; c += kLanes) most = maximum(most, load(scores + c));
  return largest(most);
}

float exponentiate(const float* scores, bf16* weights, int begin, int end, float largest) {
  const Floats shift = all(largest);
  Floats total = all(0.0f);
  for (int c = begin; c < end; c += kLanes) {
    const Floats s = load(scores + c);
    const Floats w = choose(more(s, all(-1e30f)), exp2_nonpositive(s - shift), all(0.0f));  // 0 where it may not see
    store_bf16(weights + c, w);
    total = total + w;
  }
  return sum(total);
}

void gather_queries(const Rows& rows, int head_dim, std::vector<bf16>& q) {
  q.assign(static_cast<size_t>(kMaxRows) * head_dim, 0);
  for (int r = 0; r < rows.count; ++r) std::copy(rows.q[r], rows.q[r] + head_dim, q.data() + r * head_dim);
}

}  // namespace

void attend_segment(const KvCache& cache, const int32_t* blocks, int head, const Rows& rows, int start,
                    const Attended& out) {
  Scratch& local = scratch();
  const int dim = cache.head_dim, size = cache.block_size, context = rows.context();
  if (has_amx()) gather_queries(rows, dim, local.q);
  std::fill(out.sums, out.sums + kMaxRows * dim, 0.0f);
  // What no row sees is left out, which adds as much as weights of zero.
  const int padded = (std::min(context - start, kSegment) + size - 1) / size * size;
  const int begin = std::max(rows.first[0] - start, 0) / size * size;
  for (int c = begin; c < padded; c += kLanes) {
    if (c % size == 0) {  // blocks lie anywhere in memory: the hardware cannot guess the next one
      const int block = (start + c) / size;
      prefetch<_MM_HINT_T1>(cache.value_head(blocks[block], head), cache.head_size() * sizeof(bf16));
      if (start + c + size < context) prefetch(cache.key_head(blocks[block + 1], head), cache.head_size() * sizeof(bf16));
    }
    const bf16* keys = cache.key_head(blocks[(start + c) / size], head) + 2 * (c % size);
    score(rows, keys, size, dim, c, local);
  }
  for (int r = 0; r < rows.count; ++r) {
    out.largest[r] = mask_and_max(local.scores[r], rows.first[r] - start, rows.limit[r] - start, begin, padded);
    const bool sees_none = out.largest[r] == -std::numeric_limits<float>::infinity();
    if (sees_none) std::fill(local.weights[r] + begin, local.weights[r] + padded, bf16{0});
    out.total[r] = sees_none ? 0.0f : exponentiate(local.scores[r], local.weights[r], begin, padded, out.largest[r]);
  }
  accumulate(rows, cache, blocks + (start + begin) / size, head, begin, padded - begin, out.sums);
}

}  // namespace evospec

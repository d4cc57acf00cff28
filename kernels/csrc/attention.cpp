#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention_tiles.h"
#include "tiles.h"

namespace evospec {

namespace {

// kVectorRows: so many rows at a time by vector instructions.
// kChains: independent sums of a score, always as many: a row's bits must not depend on how many rows there are.
// kValueVectors: of 16 dimensions, whose weighted sums are kept in registers.
#ifdef __AVX512F__
constexpr int kVectorRows = 7, kChains = 4, kValueVectors = 4;  // a product takes many cycles, but starts every cycle
#else
constexpr int kVectorRows = 4, kChains = 1, kValueVectors = 1;
#endif
constexpr int kValueRows = 4;  // of as many rows

// Up to kMaxRows query rows of one sequence and one KV head.
struct Rows {
  int count;
  bool by_tiles;  // of AMX: up to kMaxRows. Else up to kVectorRows
  const bf16* q[kMaxRows];
  bf16* out[kMaxRows];
  int first[kMaxRows];  // the first key this row may see, and
  int limit[kMaxRows];  // the first after that which it may not; both ascend with the rows
  float sink[kMaxRows];  // score, to base 2, of a key whose value is zero; -inf: there is none
};

struct Scratch {
  alignas(64) float scores[kMaxRows][kSegment];
  alignas(64) bf16 weights[kMaxRows][kSegment];
  std::vector<bf16> q;      // [kMaxRows][head_dim], for tiles
  std::vector<float> sums;  // [kMaxRows][head_dim] running weighted values
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
    if (rows.by_tiles) {
      score_key_tiles(local.q.data(), keys, stride, head_dim, local.scores[0] + column);
      return;
    }
  }
  kScoreKeys[rows.count - 1](rows, keys, stride, head_dim, column, local);
}

// begin: the column of the weights that belongs to the first of `blocks`.
void accumulate(const Rows& rows, const KvCache& cache, const int32_t* blocks, int head, int begin, int count,
                Scratch& local) {
  const int dim = cache.head_dim;
  constexpr int kWide = kValueVectors * kLanes, kNarrow = std::min(kWide, 32);  // a head may end with 32 dimensions
  for (int d = 0, size; d < dim; d += size) {
    size = dim - d >= kWide ? kWide : kNarrow;
    const Values values{cache, blocks, head, d};
    if constexpr (kMayHaveAmx) {
      if (rows.by_tiles) {
        add_value_tiles(size == kWide, local.weights[0] + begin, values, count, local.sums.data() + d);
        continue;
      }
    }
    const AddValues* by_rows = size == kWide ? kAddValues<kValueVectors> : kAddValues<kNarrow / kLanes>;
    for (int r = 0; r < rows.count; r += kValueRows) {
      const AddValues add = by_rows[std::min(kValueRows, rows.count - r) - 1];
      add(local.weights[r] + begin, values, count, local.sums.data() + r * dim + d);
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

void scale(float* values, int count, float factor) {
  for (int i = 0; i < count; i += kLanes) store(values + i, load(values + i) * all(factor));
}

void gather_queries(const Rows& rows, int head_dim, std::vector<bf16>& q) {
  q.assign(static_cast<size_t>(kMaxRows) * head_dim, 0);
  for (int r = 0; r < rows.count; ++r) std::copy(rows.q[r], rows.q[r] + head_dim, q.data() + r * head_dim);
}

void attend(const KvCache& cache, const int32_t* blocks, int head, const Rows& rows) {
  Scratch& local = scratch();
  const int dim = cache.head_dim, size = cache.block_size;
  const int context = rows.limit[rows.count - 1];  // rows are in order of position
  local.sums.assign(static_cast<size_t>(kMaxRows) * dim, 0.0f);
  if (rows.by_tiles) gather_queries(rows, dim, local.q);
  float largest[kMaxRows], total[kMaxRows] = {};
  std::fill(largest, largest + kMaxRows, -std::numeric_limits<float>::infinity());

  // Segments begin at multiples of their length, whatever a row may see: so its bits do not depend on the other rows.
  // What no row sees is left out, which adds as much as weights of zero.
  for (int start = rows.first[0] / kSegment * kSegment; start < context; start += kSegment) {
    const int padded = (std::min(context - start, kSegment) + size - 1) / size * size;
    const int begin = std::max(rows.first[0] - start, 0) / size * size;
    for (int c = begin; c < padded; c += kLanes) {
      if (c % size == 0) {  // blocks lie anywhere in memory: the hardware cannot guess the next one
        const int block = (start + c) / size;
        prefetch<_MM_HINT_T1>(cache.value_head(blocks[block], head), cache.head_size() * sizeof(bf16));
        if (start + c + size < context) {
          prefetch(cache.key_head(blocks[block + 1], head), cache.head_size() * sizeof(bf16));
        }
      }
      const bf16* keys = cache.key_head(blocks[(start + c) / size], head) + 2 * (c % size);
      score(rows, keys, size, dim, c, local);
    }
    for (int r = 0; r < rows.count; ++r) {
      const float segment = mask_and_max(local.scores[r], rows.first[r] - start, rows.limit[r] - start, begin, padded);
      const float next = std::max(largest[r], segment);
      if (next == -std::numeric_limits<float>::infinity()) {  // this row sees nothing of this segment
        std::fill(local.weights[r] + begin, local.weights[r] + padded, bf16{0});
        continue;
      }
      const float keep = std::exp2(largest[r] - next);
      if (keep != 1.0f) scale(local.sums.data() + r * dim, dim, keep);
      total[r] = total[r] * keep + exponentiate(local.scores[r], local.weights[r], begin, padded, next);
      largest[r] = next;
    }
    accumulate(rows, cache, blocks + (start + begin) / size, head, begin, padded - begin, local);
  }
  for (int r = 0; r < rows.count; ++r) {
    const float* sums = local.sums.data() + r * dim;
    const Floats factor = all(1.0f / (total[r] + std::exp2(rows.sink[r] - largest[r])));
    for (int d = 0; d < dim; d += kLanes) store_bf16(rows.out[r] + d, load(sums + d) * factor);
  }
}

// A weight of zero does not hide what is no number, and a freed block keeps its values until its next owner, perhaps
// another tenant's sequence, has filled it. Keys may be anything: the scores of places that are not seen are not used.
bf16 number_or_zero(bf16 x) { return (x & 0x7F80) == 0x7F80 ? bf16{0} : x; }

}  // namespace

void write_kv(const KvCache& cache, int slot, const float* key, const float* value) {
  const int block = slot / cache.block_size, offset = slot % cache.block_size, dim = cache.head_dim;
  for (int head = 0; head < cache.kv_heads; ++head, key += dim, value += dim) {
    bf16* keys = cache.key_head(block, head) + 2 * offset;
    for (int d = 0; d < dim; d += 2, keys += 2 * cache.block_size) {
      keys[0] = to_bf16(key[d]);
      keys[1] = to_bf16(key[d + 1]);
    }
    bf16* values = cache.value_head(block, head) + static_cast<size_t>(offset / 2) * 2 * dim + offset % 2;
    for (int d = 0; d < dim; ++d) values[2 * d] = number_or_zero(to_bf16(value[d]));
  }
}

void attention(Team& team, const Batch& batch, const KvCache& cache, int heads, int window, const float* sinks,
               const bf16* q, bf16* out) {
  const int group = heads / cache.kv_heads, dim = cache.head_dim;
  // Work items are laid out as: sequence, then slice of its rows, then KV head.
  auto by_tiles = [&](int b) { return has_amx() && !batch.decodes(b); };
  auto slice_rows = [&](int b) { return by_tiles(b) ? kMaxRows : kVectorRows; };
  auto slices = [&](int b) {
    const int rows = (batch.query_start[b + 1] - batch.query_start[b]) * group;
    return (rows + slice_rows(b) - 1) / slice_rows(b);
  };
  if constexpr (kMayHaveAmx) {
    if (has_amx()) configure_attention_tiles();
  }
  thread_local std::vector<int> first;  // first work item of each sequence
  first.assign(1, 0);
  for (int b = 0; b < batch.num_sequences; ++b) first.push_back(first.back() + slices(b) * cache.kv_heads);

  team.work(first.back(), [&](int item) {
    const int b = static_cast<int>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
    const int head = (item - first[b]) % cache.kv_heads;
    const int begin = (item - first[b]) / cache.kv_heads * slice_rows(b);
    const int query_len = batch.query_start[b + 1] - batch.query_start[b];
    Rows rows;
    rows.by_tiles = by_tiles(b);
    rows.count = std::min(slice_rows(b), query_len * group - begin);
    for (int r = 0; r < rows.count; ++r) {
      const int query = (begin + r) / group, h = head * group + (begin + r) % group;
      const size_t at = (static_cast<size_t>(batch.query_start[b] + query) * heads + h) * dim;
      rows.q[r] = q + at;
      rows.out[r] = out + at;
      rows.limit[r] = batch.seq_lens[b] - query_len + query + 1;
      rows.first[r] = window == 0 ? 0 : std::max(rows.limit[r] - window, 0);
      rows.sink[r] = sinks == nullptr ? -std::numeric_limits<float>::infinity() : score_scale(sinks[h]);
    }
    attend(cache, batch.block_tables + static_cast<size_t>(b) * batch.max_blocks, head, rows);
  });
  release_tiles();
}

}  // namespace evospec

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tiles.h"

namespace evospec {

namespace {

constexpr int kLanes = 16;     // keys scored at a time
constexpr int kMaxRows = 16;   // query rows (query x head of one group) that share a read of the keys
constexpr int kVectorRows = 7; // up to so many by vector instructions, more by AMX tiles if there are any
constexpr int kFewQueries = 8; // of a sequence: decoding, with or without drafts, always goes by vector instructions,
                               // whose result for a row does not depend on the other rows; prefill goes by tiles
constexpr int kSegment = 512;  // keys between two rescalings of the running softmax

// Up to kMaxRows query rows of one sequence and one KV head.
struct Rows {
  int count;
  const bf16* q[kMaxRows];
  bf16* out[kMaxRows];
  int limit[kMaxRows];  // keys this row may see
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
  constexpr int kChains = 4;  // independent sums: one product takes many cycles, but starts every cycle
  __m512 acc[R][kChains];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kChains; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  for (int d = 0; d < head_dim; d += 2 * kChains) {
    for (int c = 0; c < kChains; ++c, keys += 2 * stride) {
      const __m512bh k = load_pairs(keys);
      for (int r = 0; r < R; ++r) {
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], k, broadcast_pair(rows.q[r] + d + 2 * c));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 1; c < kChains; ++c) acc[r][0] = _mm512_add_ps(acc[r][0], acc[r][c]);
    _mm512_store_ps(local.scores[r] + column, acc[r][0]);
  }
}

using ScoreKeys = void (*)(const Rows&, const bf16*, int, int, int, Scratch&);
constexpr ScoreKeys kScoreKeys[] = {nullptr,       score_keys<1>, score_keys<2>, score_keys<3>, score_keys<4>,
                                    score_keys<5>, score_keys<6>, score_keys<7>};

// One head's values of a segment's blocks, from dimension `first` on.
struct Values {
  const KvCache& cache;
  const int32_t* blocks;
  int head;
  int first;
};

// sums[r][0 .. 16 V - 1] += weights[r] . values, for R rows and `count` tokens (whole blocks).
template <int R, int V>
void add_values(const bf16* weights, const Values& values, int count, float* sums) {
  const int dim = values.cache.head_dim, size = values.cache.block_size;
  __m512 acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_loadu_ps(sums + r * dim + v * kLanes);
  }
  for (int c = 0; c < count; c += size) {
    const bf16* row = values.cache.value_head(values.blocks[c / size], values.head) + 2 * values.first;
    for (int i = 0; i < size; i += 2, row += 2 * dim) {
      for (int v = 0; v < V; ++v) {
        const __m512bh value = load_pairs(row + v * 2 * kLanes);
        for (int r = 0; r < R; ++r) {
          acc[r][v] = _mm512_dpbf16_ps(acc[r][v], value, broadcast_pair(weights + r * kSegment + c + i));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * dim + v * kLanes, acc[r][v]);
  }
}

using AddValues = void (*)(const bf16*, const Values&, int, float*);
// By number of rows; 64 dimensions at a time, and 32 at the end of an odd head.
constexpr AddValues kAdd64[] = {nullptr, add_values<1, 4>, add_values<2, 4>, add_values<3, 4>, add_values<4, 4>};
constexpr AddValues kAdd32[] = {nullptr, add_values<1, 2>, add_values<2, 2>, add_values<3, 2>, add_values<4, 2>};

// ---- 8 to 16 rows: AMX, where the processor has it ----

// Tiles 0..3: sums (rows x 16), 4: queries (rows x 32 dimensions), 5: keys (32 dimensions x 16), 6: weights (rows x 16
// tokens), 7: values (16 tokens x 16 dimensions). A cache block is laid out as tiles 5 and 7 already.
void configure_attention_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kMaxRows, 64);
  config.set(6, kMaxRows, 32);
  config.set(7, kLanes / 2, 64);
  _tile_loadconfig(&config);
}

void gather_queries(const Rows& rows, int head_dim, std::vector<bf16>& q) {
  q.assign(static_cast<size_t>(kMaxRows) * head_dim, 0);
  for (int r = 0; r < rows.count; ++r) std::copy(rows.q[r], rows.q[r] + head_dim, q.data() + r * head_dim);
}

// As score_keys, for all rows of the tile.
void score_key_tiles(const bf16* keys, int stride, int head_dim, int column, Scratch& local) {
  _tile_zero(0);
  for (int d = 0; d < head_dim; d += 32) {
    _tile_loadd(4, local.q.data() + d, head_dim * sizeof(bf16));
    _tile_loadd(5, keys + d * stride, 2 * stride * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, local.scores[0] + column, kSegment * sizeof(float));
}

// As add_values; V (2 or 4) times 16 dimensions.
template <int V>
void add_value_tiles(const bf16* weights, const Values& values, int count, float* sums) {
  const int dim = values.cache.head_dim, size = values.cache.block_size;
  const int sums_stride = dim * sizeof(float), values_stride = 2 * dim * sizeof(bf16);
  _tile_loadd(0, sums, sums_stride);
  _tile_loadd(1, sums + kLanes, sums_stride);
  if constexpr (V == 4) {
    _tile_loadd(2, sums + 2 * kLanes, sums_stride);
    _tile_loadd(3, sums + 3 * kLanes, sums_stride);
  }
  for (int c = 0; c < count; c += kLanes) {
    const bf16* value = values.cache.value_head(values.blocks[c / size], values.head) + c % size * dim + 2 * values.first;
    _tile_loadd(6, weights + c, kSegment * sizeof(bf16));
    _tile_loadd(7, value, values_stride);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, value + 2 * kLanes, values_stride);
    _tile_dpbf16ps(1, 6, 7);
    if constexpr (V == 4) {
      _tile_loadd(7, value + 4 * kLanes, values_stride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, value + 6 * kLanes, values_stride);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, sums, sums_stride);
  _tile_stored(1, sums + kLanes, sums_stride);
  if constexpr (V == 4) {
    _tile_stored(2, sums + 2 * kLanes, sums_stride);
    _tile_stored(3, sums + 3 * kLanes, sums_stride);
  }
}

// ---- for any number of rows ----

// Scores of 16 keys, and weighted values of a segment, for all rows.
void score(const Rows& rows, const bf16* keys, int stride, int head_dim, int column, Scratch& local) {
  if (rows.count <= kVectorRows) {
    kScoreKeys[rows.count](rows, keys, stride, head_dim, column, local);
  } else {
    score_key_tiles(keys, stride, head_dim, column, local);
  }
}

void accumulate(const Rows& rows, const KvCache& cache, const int32_t* blocks, int head, int count, Scratch& local) {
  const int dim = cache.head_dim;
  for (int d = 0; d < dim; d += 64) {
    const bool whole = dim - d >= 64;
    const Values values{cache, blocks, head, d};
    if (rows.count > kVectorRows) {
      (whole ? add_value_tiles<4> : add_value_tiles<2>)(local.weights[0], values, count, local.sums.data() + d);
      continue;
    }
    for (int r = 0; r < rows.count; r += 4) {
      const AddValues* by_rows = whole ? kAdd64 : kAdd32;
      const AddValues add = by_rows[std::min(4, rows.count - r)];
      add(local.weights[r], values, count, local.sums.data() + r * dim + d);
    }
  }
}

// Masks what the row may not see, and returns the segment's largest score.
float mask_and_max(float* scores, int visible, int padded) {
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (int c = std::max(visible, 0); c < padded; ++c) scores[c] = minus_infinity;
  __m512 largest = _mm512_set1_ps(minus_infinity);
  for (int c = 0; c < padded; c += kLanes) largest = _mm512_max_ps(largest, _mm512_load_ps(scores + c));
  return _mm512_reduce_max_ps(largest);
}

float exponentiate(const float* scores, bf16* weights, int padded, float largest) {
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 total = _mm512_setzero_ps();
  for (int c = 0; c < padded; c += kLanes) {
    const __m512 s = _mm512_load_ps(scores + c);
    const __mmask16 seen = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-1e30f), _CMP_GT_OQ);
    const __m512 w = _mm512_maskz_mov_ps(seen, exp2_nonpositive(_mm512_sub_ps(s, shift)));
    store_bf16x16(weights + c, w);
    total = _mm512_add_ps(total, w);
  }
  return _mm512_reduce_add_ps(total);
}

void scale(float* values, int count, float factor) {
  for (int i = 0; i < count; i += kLanes) {
    _mm512_storeu_ps(values + i, _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(factor)));
  }
}

void attend(const KvCache& cache, const int32_t* blocks, int head, const Rows& rows) {
  Scratch& local = scratch();
  const int dim = cache.head_dim, size = cache.block_size;
  const int context = rows.limit[rows.count - 1];  // rows are in order of position
  local.sums.assign(static_cast<size_t>(kMaxRows) * dim, 0.0f);
  if (rows.count > kVectorRows) gather_queries(rows, dim, local.q);
  float largest[kMaxRows], total[kMaxRows] = {};
  std::fill(largest, largest + kMaxRows, -std::numeric_limits<float>::infinity());

  for (int start = 0; start < context; start += kSegment) {
    const int padded = (std::min(context - start, kSegment) + size - 1) / size * size;
    for (int c = 0; c < padded; c += kLanes) {
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
      const float segment = mask_and_max(local.scores[r], rows.limit[r] - start, padded);
      const float next = std::max(largest[r], segment);
      if (next == -std::numeric_limits<float>::infinity()) {  // this row sees nothing of this segment
        std::fill(local.weights[r], local.weights[r] + padded, bf16{0});
        continue;
      }
      const float keep = std::exp2(largest[r] - next);
      if (keep != 1.0f) scale(local.sums.data() + r * dim, dim, keep);
      total[r] = total[r] * keep + exponentiate(local.scores[r], local.weights[r], padded, next);
      largest[r] = next;
    }
    accumulate(rows, cache, blocks + start / size, head, padded, local);
  }
  for (int r = 0; r < rows.count; ++r) {
    const float* sums = local.sums.data() + r * dim;
    const __m512 factor = _mm512_set1_ps(1.0f / total[r]);
    for (int d = 0; d < dim; d += kLanes) {
      store_bf16x16(rows.out[r] + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), factor));
    }
  }
}

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
    for (int d = 0; d < dim; ++d) values[2 * d] = to_bf16(value[d]);
  }
}

void attention(Team& team, const Batch& batch, const KvCache& cache, int heads, const bf16* q, bf16* out) {
  const int group = heads / cache.kv_heads, dim = cache.head_dim;
  // Work items are laid out as: sequence, then slice of its rows, then KV head.
  auto slice_rows = [&](int b) {
    const bool few = batch.query_start[b + 1] - batch.query_start[b] <= kFewQueries;
    return few || !has_amx() ? kVectorRows : kMaxRows;
  };
  auto slices = [&](int b) {
    const int rows = (batch.query_start[b + 1] - batch.query_start[b]) * group;
    return (rows + slice_rows(b) - 1) / slice_rows(b);
  };
  if (has_amx()) configure_attention_tiles();
  thread_local std::vector<int> first;  // first work item of each sequence
  first.assign(1, 0);
  for (int b = 0; b < batch.num_sequences; ++b) first.push_back(first.back() + slices(b) * cache.kv_heads);

  team.work(first.back(), [&](int item) {
    const int b = static_cast<int>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
    const int head = (item - first[b]) % cache.kv_heads;
    const int begin = (item - first[b]) / cache.kv_heads * slice_rows(b);
    const int query_len = batch.query_start[b + 1] - batch.query_start[b];
    Rows rows;
    rows.count = std::min(slice_rows(b), query_len * group - begin);
    for (int r = 0; r < rows.count; ++r) {
      const int query = (begin + r) / group, h = head * group + (begin + r) % group;
      const size_t at = (static_cast<size_t>(batch.query_start[b] + query) * heads + h) * dim;
      rows.q[r] = q + at;
      rows.out[r] = out + at;
      rows.limit[r] = batch.seq_lens[b] - query_len + query + 1;
    }
    attend(cache, batch.block_tables + static_cast<size_t>(b) * batch.max_blocks, head, rows);
  });
  release_tiles();
}

}  // namespace evospec

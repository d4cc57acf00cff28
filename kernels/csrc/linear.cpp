#include "linear.h"

#include <algorithm>
#include <vector>

namespace evospec {

namespace {

constexpr int kTile = 16;
constexpr int kPairColumns = 2 * kGroup;

// Up to this many rows codes go straight into vector registers. Beyond it, expanding them to bf16 tiles once and
// multiplying with AMX costs less (docs/decisions/001-cpu-kernels.md).
constexpr int kMaxDirectRows = 3;

struct Scratch {  // per thread, grows to the largest use
  std::vector<bf16> tiles;  // expanded groups
  std::vector<float> x;     // direct path: rows as floats
  std::vector<float> sums;  // direct path: sum of x over each block
  alignas(64) float y[32 * kPairColumns];
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

// ---- what happens to 32 columns of one row ----

void finish_row(const Linear& op, int row, int column, const float* y) {
  __m512 y0 = _mm512_loadu_ps(y), y1 = _mm512_loadu_ps(y + kGroup);
  if (op.epilogue == Epilogue::kSiluMul) {
    bf16* out = static_cast<bf16*>(op.out) + static_cast<size_t>(row) * op.stride + column / 2;
    store_bf16x16(out, _mm512_mul_ps(silu(y0), y1));
    return;
  }
  if (op.weight->bias != nullptr) {
    y0 = _mm512_add_ps(y0, _mm512_loadu_ps(op.weight->bias + column));
    y1 = _mm512_add_ps(y1, _mm512_loadu_ps(op.weight->bias + column + kGroup));
  }
  float* out = static_cast<float*>(op.out) + static_cast<size_t>(row) * op.stride + column;
  const int left = op.weight->n - column;
  const __mmask16 mask0 = left >= kGroup ? 0xFFFF : static_cast<__mmask16>((1u << std::max(left, 0)) - 1);
  const __mmask16 mask1 =
      left >= kPairColumns ? 0xFFFF : static_cast<__mmask16>((1u << std::max(left - kGroup, 0)) - 1);
  if (op.epilogue == Epilogue::kAdd) {
    y0 = _mm512_add_ps(y0, _mm512_maskz_loadu_ps(mask0, out));
    y1 = _mm512_add_ps(y1, _mm512_maskz_loadu_ps(mask1, out + kGroup));
  }
  _mm512_mask_storeu_ps(out, mask0, y0);
  _mm512_mask_storeu_ps(out + kGroup, mask1, y1);
}

// ---- AMX: any number of rows ----

// Tiles 0..3: C (rows x columns), 4..5: A (rows), 6..7: B (columns).
void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, tile < 6 ? rows : kPairs, 64);
  _tile_loadconfig(&config);
}

// The tiles of `count` groups from `first` on; those of kBf16 lie in memory as they are.
const bf16* group_tiles(const Matrix& weight, int first, int count) {
  if (weight.format == kBf16) return reinterpret_cast<const bf16*>(weight.group(first));
  std::vector<bf16>& tiles = scratch().tiles;
  const size_t group_size = static_cast<size_t>(weight.k) * kGroup;
  if (tiles.size() < count * group_size) tiles.resize(count * group_size);
  for (int g = 0; g < count; ++g) expand_group(weight, first + g, tiles.data() + g * group_size);
  return tiles.data();
}

// 1 or 2 row tiles times two groups, into y[32][32].
void multiply_tiles(const bf16* x, int k, bool two, const bf16* b0, const bf16* b1, float* y) {
  const int stride = k * static_cast<int>(sizeof(bf16));
  const bf16* x1 = x + static_cast<size_t>(kTile) * k;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int b = 0; b < k / kBlock; ++b) {
    _tile_loadd(6, b0 + b * kBlock * kGroup, 64);
    _tile_loadd(7, b1 + b * kBlock * kGroup, 64);
    _tile_loadd(4, x + b * kBlock, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, x1 + b * kBlock, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int kRowBytes = kPairColumns * sizeof(float);
  _tile_stored(0, y, kRowBytes);
  _tile_stored(1, y + kGroup, kRowBytes);
  if (two) {
    _tile_stored(2, y + kTile * kPairColumns, kRowBytes);
    _tile_stored(3, y + kTile * kPairColumns + kGroup, kRowBytes);
  }
}

// Pairs begin .. end - 1. For each 32 rows all pairs in turn: the rows then come from the first-level cache, and the
// weights, which lie in a row, from the second. The other way round, many rows are read from afar for every pair.
void amx_pairs(const Linear& op, int begin, int end) {
  const Matrix& weight = *op.weight;
  const size_t group_size = static_cast<size_t>(weight.k) * kGroup;
  const bf16* tiles = group_tiles(weight, 2 * begin, 2 * (end - begin));
  float* y = scratch().y;
  for (int row = 0; row < op.rows; row += 2 * kTile) {
    const bf16* x = op.x + static_cast<size_t>(row) * weight.k;
    const int left = std::min(op.rows - row, 2 * kTile);
    const bf16* b = tiles;
    for (int pair = begin; pair < end; ++pair, b += 2 * group_size) {
      multiply_tiles(x, weight.k, left > kTile, b, b + group_size, y);
      for (int i = 0; i < left; ++i) finish_row(op, row + i, pair * kPairColumns, y + i * kPairColumns);
    }
  }
}

// With many rows, as many pairs as fit in the second-level cache beside the rows themselves, up to 8.
int pairs_at_once(const Linear& op) {
  constexpr size_t kCacheBytes = 1280 * 1024, kMost = 8;
  const size_t pair_bytes = 2 * static_cast<size_t>(op.weight->k) * kGroup * sizeof(bf16);
  return op.rows <= 2 * kTile ? 1 : static_cast<int>(std::clamp<size_t>(kCacheBytes / pair_bytes, 1, kMost));
}

// ---- direct: M rows, codes multiplied without being scaled first ----

// Interleaved (column, parity) lanes of two registers -> 16 column sums.
inline __m512 add_parities(__m512 lower, __m512 upper) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_add_ps(_mm512_permutex2var_ps(lower, even, upper), _mm512_permutex2var_ps(lower, odd, upper));
}

// The values of codes as bf16. The permutation looks at the lowest five bits: kQ4's table repeats itself.
struct CodeValues {
  alignas(64) bf16 of[32];

  explicit CodeValues(int format) {
    for (int i = 0; i < 32; ++i) of[i] = to_bf16(static_cast<float>(format == kQ4 ? i % 16 : i - 16));
  }
};
const CodeValues kQ4Values(kQ4), kQ5Values(kQ5);

// kQ4 and kQ5: one permutation turns 32 codes into bf16 integers, exactly.
template <int M, int kFormat>
void direct_lanes(const Linear& op, const uint8_t* block, __m512* acc) {
  constexpr int kRows = kFormat == kQ4 ? 4 : 3, kBits = kFormat == kQ4 ? 4 : 5;
  const __m512i table = _mm512_load_si512(kFormat == kQ4 ? kQ4Values.of : kQ5Values.of);
  const int k = op.weight->k, blocks = k / kBlock;
  const float* sums = scratch().sums.data();
  for (int b = 0; b < blocks; ++b, block += block_bytes(kFormat)) {
    __m512 part[M];
    for (int m = 0; m < M; ++m) part[m] = _mm512_setzero_ps();
    prefetch_ahead(block, kFormat);
#pragma GCC unroll 16
    for (int r = 0; r < kPairs; ++r) {
      const __m512i lanes = _mm512_loadu_si512(block + 64 * (r / kRows));
      const __m512i codes = _mm512_srli_epi16(lanes, kBits * (r % kRows));
      const __m512bh weights = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, table));
      for (int m = 0; m < M; ++m) {
        part[m] = _mm512_dpbf16_ps(part[m], weights, broadcast_pair(op.x + m * k + b * kBlock + 2 * r));
      }
    }
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kFormat));
    const __m512 s = load_half16(scales);
    for (int m = 0; m < M; ++m) acc[m] = _mm512_fmadd_ps(part[m], s, acc[m]);
    if (kFormat == kQ4) {
      const __m512 minima = load_half16(scales + kGroup);
      for (int m = 0; m < M; ++m) acc[m] = _mm512_fmadd_ps(minima, _mm512_set1_ps(sums[m * blocks + b]), acc[m]);
    }
  }
}

template <int M, int kScales>
void direct_q8(const Linear& op, const uint8_t* block, __m512* acc) {
  constexpr int kRowsPerScale = kPairs / kScales;
  const int k = op.weight->k;
  const float* x = scratch().x.data();
  for (int b = 0; b < k / kBlock; ++b, block += code_bytes(kQ8) + 32 * kScales) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kQ8));
    prefetch_ahead(block, kScales == 1 ? kQ8 : kQ8x2);
    for (int half = 0; half < kScales; ++half) {
      __m512 lower[M], upper[M];
      for (int m = 0; m < M; ++m) lower[m] = upper[m] = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int i = 0; i < kRowsPerScale; ++i) {
        const int r = half * kRowsPerScale + i;
        const __m128i* codes = reinterpret_cast<const __m128i*>(block + 32 * r);
        const __m512 q0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes)));
        const __m512 q1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1)));
        for (int m = 0; m < M; ++m) {
          double pair;  // two floats, in every pair of lanes
          std::memcpy(&pair, x + m * k + b * kBlock + 2 * r, 8);
          const __m512 xs = _mm512_castpd_ps(_mm512_set1_pd(pair));
          lower[m] = _mm512_fmadd_ps(q0, xs, lower[m]);
          upper[m] = _mm512_fmadd_ps(q1, xs, upper[m]);
        }
      }
      const __m512 s = load_half16(scales + half * kGroup);
      for (int m = 0; m < M; ++m) acc[m] = _mm512_fmadd_ps(add_parities(lower[m], upper[m]), s, acc[m]);
    }
  }
}

template <int M>
void direct_group(const Linear& op, int group, float* y) {
  __m512 acc[M];
  for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
  const uint8_t* data = op.weight->group(group);
  switch (op.weight->format) {
    case kQ8: direct_q8<M, 1>(op, data, acc); break;
    case kQ8x2: direct_q8<M, 2>(op, data, acc); break;
    case kQ5: direct_lanes<M, kQ5>(op, data, acc); break;
    default: direct_lanes<M, kQ4>(op, data, acc); break;
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(y + m * kPairColumns, acc[m]);
}

void direct_pair(const Linear& op, int pair) {
  float* y = scratch().y;
  for (int half = 0; half < 2; ++half) {
    const int group = 2 * pair + half;
    float* out = y + half * kGroup;
    switch (op.rows) {
      case 1: direct_group<1>(op, group, out); break;
      case 2: direct_group<2>(op, group, out); break;
      default: direct_group<3>(op, group, out); break;
    }
  }
  for (int m = 0; m < op.rows; ++m) finish_row(op, m, pair * kPairColumns, y + m * kPairColumns);
}

// Every thread makes its own copy: it is small, and a shared one would need another barrier.
void prepare_direct(const Linear& op) {
  Scratch& local = scratch();
  const int k = op.weight->k, blocks = k / kBlock;
  local.x.resize(static_cast<size_t>(op.rows) * k);
  local.sums.resize(static_cast<size_t>(op.rows) * blocks);
  for (int m = 0; m < op.rows; ++m) {
    for (int b = 0; b < blocks; ++b) {
      const bf16* x = op.x + m * k + b * kBlock;
      const __m512 x0 = load_bf16x16(x), x1 = load_bf16x16(x + kGroup);
      _mm512_storeu_ps(local.x.data() + m * k + b * kBlock, x0);
      _mm512_storeu_ps(local.x.data() + m * k + b * kBlock + kGroup, x1);
      local.sums[m * blocks + b] = _mm512_reduce_add_ps(_mm512_add_ps(x0, x1));
    }
  }
}

}  // namespace

void linear(Team& team, const Linear& op) {
  const bool direct = op.rows <= kMaxDirectRows && op.weight->format != kBf16;
  if (direct) {
    prepare_direct(op);
  } else {
    configure_tiles(std::min(op.rows, kTile));
  }
  const int pairs = (op.weight->n + kPairColumns - 1) / kPairColumns;
  const int step = direct ? 1 : pairs_at_once(op);
  team.work_ranges(pairs, [&](int begin, int end) {
    prefetch(op.weight->group(2 * begin), kPrefetchBytes);
    for (int pair = begin; pair < end; pair += step) {
      if (direct) {
        direct_pair(op, pair);
      } else {
        amx_pairs(op, pair, std::min(pair + step, end));
      }
    }
  });
  if (!direct) _tile_release();
}

}  // namespace evospec

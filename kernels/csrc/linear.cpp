#include "linear.h"

#include <algorithm>
#include <vector>

#include "direct.h"

namespace evospec {

namespace {

constexpr int kTile = 16;
constexpr int kPairColumns = 2 * kGroup;

struct Scratch {  // per thread, grows to the largest use
  std::vector<bf16> tiles;  // expanded groups
  DirectRows direct;
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

void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds the products of `count` blocks: 1 or 2 row tiles times two groups.
inline void multiply_blocks(const bf16* x, int k, bool two, const bf16* b0, const bf16* b1, int count) {
  const int stride = k * static_cast<int>(sizeof(bf16));
  const bf16* x1 = x + static_cast<size_t>(kTile) * k;
  for (int b = 0; b < count; ++b) {
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
}

// Stores the tiles as y[32][32] and finishes the rows.
void finish_tiles(const Linear& op, int row, int pair) {
  float* y = scratch().y;
  constexpr int kRowBytes = kPairColumns * sizeof(float);
  const int left = std::min(op.rows - row, 2 * kTile);
  _tile_stored(0, y, kRowBytes);
  _tile_stored(1, y + kGroup, kRowBytes);
  if (left > kTile) {
    _tile_stored(2, y + kTile * kPairColumns, kRowBytes);
    _tile_stored(3, y + kTile * kPairColumns + kGroup, kRowBytes);
  }
  for (int i = 0; i < left; ++i) finish_row(op, row + i, pair * kPairColumns, y + i * kPairColumns);
}

// One pair of groups times up to 32 rows. A few blocks are expanded, then multiplied: the processor runs the one
// beside the other, memory is read all the while, and tiles stay in the first-level cache.
void amx_pair(const Linear& op, int pair) {
  const Matrix& weight = *op.weight;
  const int blocks = weight.num_blocks();
  const bool two = op.rows > kTile;
  zero_tiles();
  if (weight.format == kBf16) {
    const bf16* b0 = reinterpret_cast<const bf16*>(weight.group(2 * pair));
    multiply_blocks(op.x, weight.k, two, b0, reinterpret_cast<const bf16*>(weight.group(2 * pair + 1)), blocks);
  } else {
    constexpr int kAtOnce = 4, kSize = kAtOnce * kBlock * kGroup;
    alignas(64) bf16 tiles[2 * kSize];
    for (int b = 0; b < blocks; b += kAtOnce) {
      const int count = std::min(kAtOnce, blocks - b);
      expand_blocks(weight, 2 * pair, b, count, tiles);
      expand_blocks(weight, 2 * pair + 1, b, count, tiles + kSize);
      multiply_blocks(op.x + b * kBlock, weight.k, two, tiles, tiles + kSize, count);
    }
  }
  finish_tiles(op, 0, pair);
}

// The tiles of `count` groups from `first` on; those of kBf16 lie in memory as they are.
const bf16* group_tiles(const Matrix& weight, int first, int count) {
  if (weight.format == kBf16) return reinterpret_cast<const bf16*>(weight.group(first));
  std::vector<bf16>& tiles = scratch().tiles;
  const size_t group_size = static_cast<size_t>(weight.k) * kGroup;
  if (tiles.size() < count * group_size) tiles.resize(count * group_size);
  for (int g = 0; g < count; ++g) {
    expand_blocks(weight, first + g, 0, weight.num_blocks(), tiles.data() + g * group_size);
  }
  return tiles.data();
}

// Many rows. For each 32 of them all pairs begin .. end - 1 in turn: the rows then come from the first-level cache, and
// the weights, which lie in a row, from the second. The other way round, rows are read from afar for every pair.
void amx_pairs(const Linear& op, int begin, int end) {
  const Matrix& weight = *op.weight;
  const size_t group_size = static_cast<size_t>(weight.k) * kGroup;
  const bf16* tiles = group_tiles(weight, 2 * begin, 2 * (end - begin));
  for (int row = 0; row < op.rows; row += 2 * kTile) {
    const bf16* x = op.x + static_cast<size_t>(row) * weight.k;
    const bf16* b = tiles;
    for (int pair = begin; pair < end; ++pair, b += 2 * group_size) {
      zero_tiles();
      multiply_blocks(x, weight.k, op.rows - row > kTile, b, b + group_size, weight.num_blocks());
      finish_tiles(op, row, pair);
    }
  }
}

// As many pairs as fit in the second-level cache beside the rows themselves, up to 8.
int pairs_at_once(const Linear& op) {
  constexpr size_t kCacheBytes = 1280 * 1024, kMost = 8;
  const size_t pair_bytes = 2 * static_cast<size_t>(op.weight->k) * kGroup * sizeof(bf16);
  return static_cast<int>(std::clamp<size_t>(kCacheBytes / pair_bytes, 1, kMost));
}

// ---- few rows ----

void direct_pair(const Linear& op, int pair) {
  float* y = scratch().y;
  scratch().direct.multiply(*op.weight, 2 * pair, y, kPairColumns);
  scratch().direct.multiply(*op.weight, 2 * pair + 1, y + kGroup, kPairColumns);
  for (int m = 0; m < op.rows; ++m) finish_row(op, m, pair * kPairColumns, y + m * kPairColumns);
}

}  // namespace

void linear(Team& team, const Linear& op) {
  const bool direct = op.rows <= kMaxDirectRows && op.weight->format != kBf16;
  const bool many = op.rows > 2 * kTile;
  if (direct) {
    scratch().direct.assign(op.x, op.rows, op.weight->k);
  } else {
    configure_tiles(std::min(op.rows, kTile));
  }
  const int pairs = (op.weight->n + kPairColumns - 1) / kPairColumns;
  const int step = many ? pairs_at_once(op) : 1;
  team.work_ranges(pairs, [&](int begin, int end) {
    prefetch(op.weight->group(2 * begin), kPrefetchBytes);
    for (int pair = begin; pair < end; pair += step) {
      if (direct) {
        direct_pair(op, pair);
      } else if (many) {
        amx_pairs(op, pair, std::min(pair + step, end));
      } else {
        amx_pair(op, pair);
      }
    }
  });
  if (!direct) _tile_release();
}

}  // namespace evospec

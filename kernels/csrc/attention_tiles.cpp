#ifdef __AMX_BF16__

#include "attention_tiles.h"

namespace evospec {

// Tiles 0..3: sums (rows x 16), 4: queries (rows x 32 dimensions), 5: keys (32 dimensions x 16), 6: weights (rows x 16
// tokens), 7: values (16 tokens x 16 dimensions).
void configure_attention_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kMaxRows, 64);
  config.set(6, kMaxRows, 32);
  config.set(7, kLanes / 2, 64);
  _tile_loadconfig(&config);
}

void score_key_tiles(const bf16* q, const bf16* keys, int stride, int head_dim, float* scores) {
  _tile_zero(0);
  for (int d = 0; d < head_dim; d += 32) {
    _tile_loadd(4, q + d, head_dim * sizeof(bf16));
    _tile_loadd(5, keys + d * stride, 2 * stride * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, scores, kSegment * sizeof(float));
}

void add_value_tiles(bool four, const bf16* weights, const Values& values, int count, float* sums) {
  const int dim = values.cache.head_dim, size = values.cache.block_size;
  const int sums_stride = dim * sizeof(float), values_stride = 2 * dim * sizeof(bf16);
  _tile_loadd(0, sums, sums_stride);
  _tile_loadd(1, sums + kLanes, sums_stride);
  if (four) {
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
    if (four) {
      _tile_loadd(7, value + 4 * kLanes, values_stride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, value + 6 * kLanes, values_stride);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, sums, sums_stride);
  _tile_stored(1, sums + kLanes, sums_stride);
  if (four) {
    _tile_stored(2, sums + 2 * kLanes, sums_stride);
    _tile_stored(3, sums + 3 * kLanes, sums_stride);
  }
}

}  // namespace evospec

#endif

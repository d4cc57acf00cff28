// Products of up to 32 bf16 rows with pairs of expanded groups: by AMX tiles where the processor has them, by vectors
// where it has not.
#pragma once

#include "matrix.h"

namespace evospec {

constexpr int kTile = 16;                // rows of an AMX tile
constexpr int kMaxTileRows = 2 * kTile;  // rows of one product

// part(first, count) for all rows, in equal parts of at most `most`: 32 rows as 11, 11, 10 instead of 12, 12, 8.
// Always inlined: as a call it made a step some 3 % slower.
template <typename Part>
inline __attribute__((always_inline)) void in_equal_parts(int rows, int most, Part part) {
  for (int row = 0, parts = (rows + most - 1) / most; parts > 0; --parts) {
    const int count = (rows - row + parts - 1) / parts;
    part(row, count);
    row += count;
  }
}

// Operand of _tile_loadconfig: the shape of the eight AMX tile registers.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    bytes_per_row[tile] = static_cast<uint16_t>(num_bytes);
  }
};

// Whether this library was compiled to use AMX where it finds it.
#ifdef __AMX_BF16__
constexpr bool kMayHaveAmx = true;
#else
constexpr bool kMayHaveAmx = false;
#endif

bool has_amx();
// Whether bf16 products are faster than those of float32. By Intel's vdpbf16ps they are not, by AMD's they are.
bool has_fast_bf16();

// Before and after the products of one thread that have up to `rows` rows each.
void configure_tiles(int rows);
void configure_integer_tiles(int rows);  // those of direct_tiles.h; with AMX only
void release_tiles();

// One product after the other: y[rows][32] = 0, then += x * blocks for some blocks at a time, then complete.
// With AMX the sums live in the tile registers until `complete` writes them to y.
struct TileProduct {
  int rows;
  int k;     // elements from one row of x to the next
  float* y;  // [32][32]

  void begin() const;
  void resume() const;  // in place of begin, where y has sums that were completed
  // x: [rows padded to 16][k], at the first of `count` blocks; tiles: those blocks of a pair, [count][2][16][32].
  void add(const bf16* x, const bf16* tiles, int count) const;
  void complete() const;
};

}  // namespace evospec

#include "tiles.h"

#include <algorithm>
#include <array>
#include <utility>

#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace evospec {

namespace {

bool amx_found = false;

// ---- vectors ----

// kVectorRows: how many rows' sums fill the registers, beside weights and x. kRowsOfTwoGroups: up to how many rows the
// registers hold the sums of two groups; independent sums do not wait for each other.
#ifdef __AVX512F__
constexpr int kVectorRows = 12, kRowsOfTwoGroups = 12;
#else
constexpr int kVectorRows = 4, kRowsOfTwoGroups = 2;
#endif

// y[M][G][16] += x * the blocks of G groups of a pair.
template <int M, int G>
void add_groups(const bf16* x, int k, const bf16* tiles, int count, float* y) {
  Floats acc[M][G];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    for (int g = 0; g < G; ++g) acc[m][g] = load(y + m * kPairColumns + g * kGroup);
  }
  for (int b = 0; b < count; ++b, tiles += kBlock * kPairColumns, x += kBlock) {
    for (int pair_row = 0; pair_row < kPairs; ++pair_row) {
      Pairs weights[G];
      for (int g = 0; g < G; ++g) weights[g] = load_pairs(tiles + g * kBlock * kGroup + 2 * kGroup * pair_row);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const OnePair value = broadcast_pair(x + static_cast<size_t>(m) * k + 2 * pair_row);
        for (int g = 0; g < G; ++g) acc[m][g] = add_products(acc[m][g], weights[g], value);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    for (int g = 0; g < G; ++g) store(y + m * kPairColumns + g * kGroup, acc[m][g]);
  }
}

template <int M>
void add_vectors(const bf16* x, int k, const bf16* tiles, int count, float* y) {
  if constexpr (M <= kRowsOfTwoGroups) {
    add_groups<M, 2>(x, k, tiles, count, y);
  } else {
    add_groups<M, 1>(x, k, tiles, count, y);
    add_groups<M, 1>(x, k, tiles + kBlock * kGroup, count, y + kGroup);
  }
}

using AddVectors = void (*)(const bf16*, int, const bf16*, int, float*);
constexpr auto kAddVectors = []<int... M>(std::integer_sequence<int, M...>) {
  return std::array<AddVectors, sizeof...(M)>{add_vectors<M + 1>...};
}(std::make_integer_sequence<int, kVectorRows>());

// ---- AMX ----

#ifdef __AMX_BF16__

// Tiles 0..3: C (rows x columns), 4..5: A (rows), 6..7: B (columns).
void add_tiles(const bf16* x, int k, bool two, const bf16* tiles, int count) {
  const int stride = k * static_cast<int>(sizeof(bf16));
  const bf16* x1 = x + static_cast<size_t>(kTile) * k;
  for (int b = 0; b < count; ++b, tiles += kBlock * kPairColumns) {
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + kBlock * kGroup, 64);
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

// As the operating system and the processor tell it.
bool find_tiles() {
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  constexpr unsigned kAmx = 1u << 22 | 1u << 25;  // for bf16 and int8: of leaf 7, EDX
  unsigned eax, ebx, ecx, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  return (edx & kAmx) == kAmx && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

void load_config(const TileConfig& config) { _tile_loadconfig(&config); }
void release() { _tile_release(); }

void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void load_tiles(const float* y, bool two) {
  constexpr int kRowBytes = kPairColumns * sizeof(float);
  _tile_loadd(0, y, kRowBytes);
  _tile_loadd(1, y + kGroup, kRowBytes);
  if (two) {
    _tile_loadd(2, y + kTile * kPairColumns, kRowBytes);
    _tile_loadd(3, y + kTile * kPairColumns + kGroup, kRowBytes);
  }
}

void store_tiles(float* y, bool two) {
  constexpr int kRowBytes = kPairColumns * sizeof(float);
  _tile_stored(0, y, kRowBytes);
  _tile_stored(1, y + kGroup, kRowBytes);
  if (two) {
    _tile_stored(2, y + kTile * kPairColumns, kRowBytes);
    _tile_stored(3, y + kTile * kPairColumns + kGroup, kRowBytes);
  }
}

#else  // never called: amx_found stays false

bool find_tiles() { return false; }
void load_config(const TileConfig&) {}
void release() {}
void clear_tiles() {}
void add_tiles(const bf16*, int, bool, const bf16*, int) {}
void load_tiles(const float*, bool) {}
void store_tiles(float*, bool) {}

#endif

}  // namespace

// Asks the operating system for the tile registers. Called once, before anything else.
extern "C" void evo_find_tiles() { amx_found = find_tiles(); }

bool has_amx() { return amx_found; }

bool has_fast_bf16() {
#ifdef __AVX512BF16__
  return amx_found || !is_intel();
#else
  return false;
#endif
}

void configure_integer_tiles(int rows) {
  TileConfig config;
  const int first = std::min(rows, kTile), second = rows > kTile ? rows - kTile : rows;
  for (int tile = 0; tile < 4; ++tile) config.set(tile, tile < 2 ? first : second, 64);
  config.set(4, first, kBlock);
  config.set(5, second, kBlock);
  for (int tile = 6; tile < 8; ++tile) config.set(tile, kQuads, 64);
  load_config(config);
}

void configure_tiles(int rows) {
  if (!amx_found) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, tile < 6 ? std::min(rows, kTile) : kPairs, 64);
  load_config(config);
}

void release_tiles() {
  if (amx_found) release();
}

void TileProduct::begin() const {
  if (amx_found) {
    clear_tiles();
  } else {
    std::fill(y, y + rows * kPairColumns, 0.0f);
  }
}

void TileProduct::resume() const {
  if (amx_found) load_tiles(y, rows > kTile);
}

void TileProduct::add(const bf16* x, const bf16* tiles, int count) const {
  if (amx_found) {
    add_tiles(x, k, rows > kTile, tiles, count);
    return;
  }
  in_equal_parts(rows, kVectorRows, [&](int first, int size) {
    kAddVectors[size - 1](x + static_cast<size_t>(first) * k, k, tiles, count, y + first * kPairColumns);
  });
}

void TileProduct::complete() const {
  if (amx_found) store_tiles(y, rows > kTile);
}

}  // namespace evospec

#include "tiles.h"

#include <algorithm>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace evospec {

namespace {

bool amx_found = false;

// Tiles 0..3: C (rows x columns), 4..5: A (rows), 6..7: B (columns).
inline void add_amx(const bf16* x, int k, bool two, const bf16* b0, const bf16* b1, int count) {
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

// 2 * 12 sums, two vectors of weights and one of x fill the 32 registers.
constexpr int kVectorRows = 12;

template <int M>
void add_vectors(const bf16* x, int k, const bf16* b0, const bf16* b1, int count, float* y) {
  __m512 acc[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    acc[m][0] = _mm512_loadu_ps(y + m * kPairColumns);
    acc[m][1] = _mm512_loadu_ps(y + m * kPairColumns + kGroup);
  }
  for (int pair = 0; pair < count * kPairs; ++pair) {
    const __m512bh w0 = load_pairs(b0 + 2 * kGroup * pair), w1 = load_pairs(b1 + 2 * kGroup * pair);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512bh value = broadcast_pair(x + static_cast<size_t>(m) * k + 2 * pair);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, value);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, value);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(y + m * kPairColumns, acc[m][0]);
    _mm512_storeu_ps(y + m * kPairColumns + kGroup, acc[m][1]);
  }
}

using AddVectors = void (*)(const bf16*, int, const bf16*, const bf16*, int, float*);
constexpr AddVectors kAddVectors[] = {nullptr,        add_vectors<1>, add_vectors<2>,  add_vectors<3>, add_vectors<4>,
                                      add_vectors<5>, add_vectors<6>, add_vectors<7>,  add_vectors<8>, add_vectors<9>,
                                      add_vectors<10>, add_vectors<11>, add_vectors<12>};

}  // namespace

void find_amx() {
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  constexpr unsigned kAmxBf16 = 1u << 22;  // of leaf 7, EDX
  unsigned eax, ebx, ecx, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  amx_found = (edx & kAmxBf16) != 0 && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

bool has_amx() { return amx_found; }

void configure_tiles(int rows) {
  if (!amx_found) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, tile < 6 ? std::min(rows, kTile) : kPairs, 64);
  _tile_loadconfig(&config);
}

void release_tiles() {
  if (amx_found) _tile_release();
}

void TileProduct::begin() const {
  if (!amx_found) {
    std::fill(y, y + rows * kPairColumns, 0.0f);
    return;
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void TileProduct::add(const bf16* x, const bf16* b0, const bf16* b1, int count) const {
  if (amx_found) {
    add_amx(x, k, rows > kTile, b0, b1, count);
    return;
  }
  in_equal_parts(rows, kVectorRows, [&](int first, int size) {
    kAddVectors[size](x + static_cast<size_t>(first) * k, k, b0, b1, count, y + first * kPairColumns);
  });
}

void TileProduct::complete() const {
  if (!amx_found) return;
  constexpr int kRowBytes = kPairColumns * sizeof(float);
  _tile_stored(0, y, kRowBytes);
  _tile_stored(1, y + kGroup, kRowBytes);
  if (rows > kTile) {
    _tile_stored(2, y + kTile * kPairColumns, kRowBytes);
    _tile_stored(3, y + kTile * kPairColumns + kGroup, kRowBytes);
  }
}

}  // namespace evospec

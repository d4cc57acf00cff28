// Products of many rows' integers with codes by AMX's tiles: the sums of dot_avx512.h, in less time.
//
// While tiles are multiplied or stored, vectors run at half of their speed. So the sums of a few blocks are made first,
// and scaled then: few enough to stay in the first-level cache with all that they are made of. A block of kQ6 has two
// scales, which would be twice as many sums: it is no faster this way.
#pragma once

#include <algorithm>

#include "dot_avx512.h"
#include "tiles.h"

namespace evospec {

constexpr int kBlocksOfSums = 3;
constexpr int kGroupsOfPair = 2;

using TileSums = int32_t[kGroupsOfPair][kMaxTileRows][kGroup];

struct alignas(64) TileRoom {  // of a thread
  uint8_t codes[kBlocksOfSums][kGroupsOfPair][kBlock * kGroup];
  TileSums sums[2 * kBlocksOfSums];  // of each digit of a block
};

inline TileRoom& tile_room() {
  thread_local TileRoom room;
  return room;
}

// One digit of a block, and the codes that it is multiplied with.
struct TileOperands {
  const int8_t* digits;  // of the first row
  const uint8_t* codes[kGroupsOfPair];
};

// sums[i][group][row] of `count` operands; rows lie `stride` bytes apart. kTwo: of more than 16 rows. Tiles 0 to 3:
// sums, each stored while the next two are made; 4, 5: digits; 6, 7: codes.
template <bool kTwo>
void make_tile_sums(const TileOperands* operands, int count, size_t stride, TileSums* sums) {
  int32_t *behind2 = nullptr, *behind3 = nullptr;  // where tiles 2 and 3 go
  for (int i = 0; i < count; i += kTwo ? 1 : 2) {
    const TileOperands& a = operands[i];
    _tile_loadd(4, a.digits, stride);
    _tile_loadd(6, a.codes[0], 64);
    _tile_zero(0);
    _tile_dpbsud(0, 4, 6);
    if (i > 0) _tile_stored(2, behind2, 64);
    _tile_loadd(7, a.codes[1], 64);
    _tile_zero(1);
    _tile_dpbsud(1, 4, 7);
    if (i > 0) _tile_stored(3, behind3, 64);
    behind2 = behind3 = nullptr;
    if (kTwo || i + 1 < count) {
      const TileOperands& b = kTwo ? a : operands[i + 1];
      _tile_loadd(5, kTwo ? a.digits + kTile * stride : b.digits, stride);
      if (!kTwo) _tile_loadd(6, b.codes[0], 64);
      _tile_zero(2);
      _tile_dpbsud(2, 5, 6);
      _tile_stored(0, sums[i][0], 64);
      if (!kTwo) _tile_loadd(7, b.codes[1], 64);
      _tile_zero(3);
      _tile_dpbsud(3, 5, 7);
      _tile_stored(1, sums[i][1], 64);
      behind2 = kTwo ? sums[i][0][kTile] : sums[i + 1][0][0];
      behind3 = kTwo ? sums[i][1][kTile] : sums[i + 1][1][0];
    } else {
      _tile_stored(0, sums[i][0], 64);
      _tile_stored(1, sums[i][1], 64);
    }
  }
  if (behind2 == nullptr) return;
  _tile_stored(2, behind2, 64);
  _tile_stored(3, behind3, 64);
}

// A pair of groups times up to 32 rows. Block: of DirectRows (direct.h).
template <int kDigits, int kFormat, typename Block>
struct DirectTiles {
  static constexpr size_t kBytes = block_bytes(kFormat);

  const uint8_t* blocks;  // of the pair
  const Block* rows;      // [rows][num_blocks]; as many as tiles are configured for are read
  int count, num_blocks;
  float* y;  // [count][32]

  void multiply(bool two, const ReadAhead& ahead) const {
    for (int first = 0; first < num_blocks; first += kBlocksOfSums) {
      const int size = std::min(kBlocksOfSums, num_blocks - first);
      make_sums(first, size, two, ahead);
      if (size == kBlocksOfSums) {
        add<kBlocksOfSums>(first, 0);
      } else {
        for (int i = 0; i < size; ++i) add<1>(first + i, i);
      }
    }
  }

 private:
  const uint8_t* block_of(int block, int group) const { return blocks + (2 * block + group) * kBytes; }

  // Codes as bytes: as they lie in memory, or in `room`.
  static const uint8_t* bytes_of(const uint8_t* block, uint8_t* room) {
    if constexpr (has_whole_bytes(kFormat)) return block;
#pragma GCC unroll 4
    for (int j = 0; j < kQuads / 2; ++j) {
      __m512i quads[2];
      load_two_quads<kFormat>(block, j, quads);
      _mm512_store_si512(room + 128 * j, quads[0]);
      _mm512_store_si512(room + 128 * j + 64, quads[1]);
    }
    return room;
  }

  void make_sums(int first, int size, bool two, const ReadAhead& ahead) const {
    TileRoom& room = tile_room();
    TileOperands operands[kDigits * kBlocksOfSums];
    for (int i = 0; i < size; ++i) {
      ahead.prefetch_behind(block_of(first + i, 0), 2 * kBytes);
      const uint8_t* codes[kGroupsOfPair];
      for (int g = 0; g < kGroupsOfPair; ++g) codes[g] = bytes_of(block_of(first + i, g), room.codes[i][g]);
      for (int d = 0; d < kDigits; ++d) {
        operands[kDigits * i + d] = {rows[first + i].digits.high + d * kBlock, {codes[0], codes[1]}};
      }
    }
    const auto make = two ? make_tile_sums<true> : make_tile_sums<false>;
    make(operands, kDigits * size, num_blocks * sizeof(Block), room.sums);
  }

  // y += the sums of kSize blocks, the i-th of a room first, times scales; and minima times what rows sum up to.
  template <int kSize>
  void add(int first, int i) const {
    Floats scales[kSize][kGroupsOfPair], minima[kSize][kGroupsOfPair];  // in registers, as every loop is unrolled
#pragma GCC unroll 3
    for (int b = 0; b < kSize; ++b) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroupsOfPair; ++g) {
        const auto* halves = reinterpret_cast<const uint16_t*>(block_of(first + b, g) + code_bytes(kFormat));
        scales[b][g] = load_half(halves);
        if constexpr (kFormat == kQ4) minima[b][g] = load_half(halves + kGroup);
      }
    }
    const TileSums* const sums = tile_room().sums + kDigits * i;
    for (int m = 0; m < count; ++m) {
      const Block* const x = rows + static_cast<size_t>(m) * num_blocks + first;
      float* const out = y + m * kPairColumns;
      Floats acc0 = first == 0 ? all(0.0f) : load(out), acc1 = first == 0 ? all(0.0f) : load(out + kGroup);
#pragma GCC unroll 3
      for (int b = 0; b < kSize; ++b) {
        const Floats scale = all(x[b].scale);
        acc0 = multiply_add(to_floats(sum_of(sums + kDigits * b, 0, m, x[b])), scales[b][0] * scale, acc0);
        acc1 = multiply_add(to_floats(sum_of(sums + kDigits * b, 1, m, x[b])), scales[b][1] * scale, acc1);
        if constexpr (kFormat == kQ4) {
          acc0 = multiply_add(minima[b][0], all(x[b].sum), acc0);
          acc1 = multiply_add(minima[b][1], all(x[b].sum), acc1);
        }
      }
      store(out, acc0);
      store(out + kGroup, acc1);
    }
  }

  static Ints sum_of(const TileSums* sums, int group, int m, const Block& x) {
    Ints sum = load(sums[kDigits - 1][group][m]);
    if constexpr (kDigits == 2) sum = plus(sum, _mm512_slli_epi32(load(sums[0][group][m]), Digits<2>::kLowBits));
    if constexpr (code_offset(kFormat) != 0) {
      sum = plus(sum, all(-code_offset(kFormat) * (x.code_sum[0] + x.code_sum[1])));
    }
    return sum;
  }
};

}  // namespace evospec

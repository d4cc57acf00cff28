// Products of quantised weights whose codes are multiplied as integers, without being expanded first.
//
// x is written as scale * (128 high + low) for each block of 32 k, with high and low in 8 bits: 15 bits below the
// block's largest value, where bf16 has 8. Or as scale * high, for half of the instructions, if the format takes_one_digit.
// Sums of a block are then exact integers, and float32 only adds up blocks, always in the same order: a row's result does
// not depend on how many rows are multiplied with it.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "matrix.h"
#include "tiles.h"

#ifdef __AVX512F__
#include "dot_avx512.h"
#else
#include "dot_avx2.h"
#endif

#ifdef __AMX_INT8__
#include "direct_tiles.h"
#endif

namespace evospec {

// Rows of activations as the integers of a product.
template <int kDigits>
class DirectRows {
 public:
  // Rows of k values, which `set` gives. They lie in `room`, two cache lines for each 32 values; null: in memory of their own.
  void begin(int rows, int k, void* room) {
    blocks_ = k / kBlock;
    const size_t size = static_cast<size_t>(rows + kMaxTileRows) * blocks_;  // the last part is read as if it were whole
    if (room == nullptr && own_.size() < size) own_.resize(size);
    data_ = room == nullptr ? own_.data() : static_cast<Block*>(room);
  }

  // Rows first .. last - 1 of x: bf16 [rows][k].
  void set(const bf16* x, int first, int last) {
    for (size_t i = static_cast<size_t>(first) * blocks_; i < static_cast<size_t>(last) * blocks_; ++i) {
      Block& out = data_[i];
      const Floats x0 = load_bf16(x + i * kBlock), x1 = load_bf16(x + i * kBlock + 16);
      const float most = largest(maximum(absolute(x0), absolute(x1)));
      constexpr float kLargest = Digits<kDigits>::kLargest;
      const float scale = most / kLargest;
      const Floats inverse = all(most > kSmallest ? kLargest / most : 0.0f);
      const Ints q0 = to_ints(x0 * inverse), q1 = to_ints(x1 * inverse);
      out.digits.set(q0, q1);
      out.scale = scale;
      out.code_sum[0] = sum(q0);
      out.code_sum[1] = sum(q1);
      out.sum = scale * static_cast<float>(out.code_sum[0] + out.code_sum[1]);
    }
  }

  static constexpr int kMost = max_rows(kDigits);

  // y[m][column] = the product of row first + m with the 32 columns of a pair of groups, for count <= kMost rows.
  void multiply(const Matrix& weight, int pair, int first, int count, const ReadAhead& ahead, float* y) const {
    using Multiply = void (DirectRows::*)(const Matrix&, int, const Block*, const ReadAhead&, float*) const;
    static constexpr auto kByRows = []<int... M>(std::integer_sequence<int, M...>) {
      return std::array<Multiply, sizeof...(M)>{&DirectRows::multiply_rows<M + 1>...};
    }(std::make_integer_sequence<int, kMost>());
    (this->*kByRows[count - 1])(weight, pair, data_ + static_cast<size_t>(first) * blocks_, ahead, y);
  }

  // The same after configure_integer_tiles(tile_rows), for count <= tile_rows rows of a format that is not kQ6.
#ifdef __AMX_INT8__
  void multiply_by_tiles(const Matrix& weight, int pair, int first, int count, int tile_rows, const ReadAhead& ahead,
                         float* y) const {
    with_format(weight.format, [&](auto format) {
      if constexpr (format != kQ6) {
        const Block* const rows = data_ + static_cast<size_t>(first) * blocks_;
        const DirectTiles<kDigits, format, Block> tiles{weight.pair(pair), rows, count, blocks_, y};
        tiles.multiply(tile_rows > kTile, ahead);
      }
    });
  }
#else  // never called
  void multiply_by_tiles(const Matrix&, int, int, int, int, const ReadAhead&, float*) const {}
#endif

 private:
  static constexpr float kSmallest = 1e-30f;  // a block below it counts as zeros: its inverse could overflow

  struct alignas(64) Block {  // 32 k of one row
    Digits<kDigits> digits;
    float scale;
    float sum;            // of the values
    int32_t code_sum[2];  // of the integers, k < 16 and the rest
    int32_t padding[kDigits == 2 ? 12 : 4];
  };
  static_assert(sizeof(Block) == (kDigits == 2 ? 128 : 64));

  template <int M>
  void multiply_rows(const Matrix& weight, int pair, const Block* rows, const ReadAhead& ahead, float* y) const {
    const uint8_t* blocks = weight.pair(pair);
    for (int g = 0; g < 2; g += kGroupsAtOnce, y += kGroup, blocks += block_bytes(weight.format)) {
      with_format(weight.format, [&](auto format) { multiply_format<M, format>(blocks, rows, ahead, y); });
    }
  }

  // run(the format, an integral_constant), if so many digits are multiplied with it.
  template <typename Run>
  static void with_format(int format, Run run) {
    const auto run_as = [&](auto known) {
      if constexpr (kDigits == 2 || takes_one_digit(known)) run(known);
    };
    switch (format) {
      case kQ8: run_as(std::integral_constant<int, kQ8>()); break;
      case kQ6: run_as(std::integral_constant<int, kQ6>()); break;
      case kQ5: run_as(std::integral_constant<int, kQ5>()); break;
      default: run_as(std::integral_constant<int, kQ4>()); break;
    }
  }

  // `blocks`: the first ones of kGroupsAtOnce groups, side by side.
  template <int M, int kFormat>
  void multiply_format(const uint8_t* blocks, const Block* rows, const ReadAhead& ahead, float* y) const {
    constexpr int kParts = kFormat == kQ6 ? 2 : 1;  // of a block, with scales of their own
    Floats acc[kGroupsAtOnce][M];  // in registers, but only if every loop over them is unrolled: GCC stores them else
#pragma GCC unroll 2
    for (int g = 0; g < kGroupsAtOnce; ++g) {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) acc[g][m] = all(0.0f);
    }
    for (int b = 0; b < blocks_; ++b, blocks += 2 * block_bytes(kFormat)) {
      ahead.prefetch_behind(blocks, 2 * block_bytes(kFormat));
      auto row = [&](int m) -> const Block& { return rows[static_cast<size_t>(m) * blocks_ + b]; };
      auto scales = [&](int g, int part) {
        const uint8_t* at = blocks + g * block_bytes(kFormat) + code_bytes(kFormat);
        return load_half(reinterpret_cast<const uint16_t*>(at) + part * kGroup);
      };
      auto add_part = [&](auto part) {  // an integral_constant: quad rows have to be known to the compiler
        constexpr int kSize = kQuads / kParts, kBegin = part * kSize;
        int shifts[M];
        for (int m = 0; m < M; ++m) {
          const int sum = kParts == 2 ? row(m).code_sum[part] : row(m).code_sum[0] + row(m).code_sum[1];
          shifts[m] = code_offset(kFormat) * sum;
        }
        Ints sums[kGroupsAtOnce][M];
        dot<kDigits, M, kFormat, kBegin, kBegin + kSize>(blocks, row, shifts, sums);
        Floats s[kGroupsAtOnce];
        for (int g = 0; g < kGroupsAtOnce; ++g) s[g] = scales(g, part);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const Floats scale = all(row(m).scale);
#pragma GCC unroll 2
          for (int g = 0; g < kGroupsAtOnce; ++g) {
            acc[g][m] = multiply_add(to_floats(sums[g][m]), s[g] * scale, acc[g][m]);
          }
        }
      };
      add_part(std::integral_constant<int, 0>());
      if constexpr (kParts == 2) add_part(std::integral_constant<int, 1>());
      if constexpr (kFormat == kQ4) {
        Floats minima[kGroupsAtOnce];
        for (int g = 0; g < kGroupsAtOnce; ++g) minima[g] = scales(g, 1);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const Floats sum = all(row(m).sum);
#pragma GCC unroll 2
          for (int g = 0; g < kGroupsAtOnce; ++g) acc[g][m] = multiply_add(minima[g], sum, acc[g][m]);
        }
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < kGroupsAtOnce; ++g) {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) store(y + m * kPairColumns + g * kGroup, acc[g][m]);
    }
  }

  int blocks_ = 0;
  Block* data_ = nullptr;  // [rows][blocks]
  std::vector<Block> own_;
};

}  // namespace evospec

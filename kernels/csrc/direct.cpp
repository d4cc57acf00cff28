#include "direct.h"

#include <algorithm>
#include <array>
#include <utility>

namespace evospec {

namespace {

constexpr float kSmallest = 1e-30f;  // a block below it counts as zeros: its inverse could overflow

}  // namespace

template <int kDigits>
void DirectRows<kDigits>::assign(const bf16* x, int rows, int k) {
  blocks_ = k / kBlock;
  if (data_.size() < static_cast<size_t>(rows) * blocks_) data_.resize(static_cast<size_t>(rows) * blocks_);
  for (size_t i = 0; i < static_cast<size_t>(rows) * blocks_; ++i) {
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

// `blocks`: the first ones of kGroupsAtOnce groups, side by side.
template <int kDigits>
template <int M, int kFormat>
void DirectRows<kDigits>::multiply_format(const uint8_t* blocks, const Block* rows, float* y) const {
  constexpr int kParts = kFormat == kQ6 ? 2 : 1;  // of a block, with scales of their own
  Floats acc[kGroupsAtOnce][M];
  for (auto& group : acc) std::fill(group, group + M, all(0.0f));
  for (int b = 0; b < blocks_; ++b, blocks += 2 * block_bytes(kFormat)) {
    prefetch_ahead(blocks, kFormat);
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
        for (int g = 0; g < kGroupsAtOnce; ++g) acc[g][m] = multiply_add(minima[g], sum, acc[g][m]);
      }
    }
  }
  for (int g = 0; g < kGroupsAtOnce; ++g) {
    for (int m = 0; m < M; ++m) store(y + m * kPairColumns + g * kGroup, acc[g][m]);
  }
}

template <int kDigits>
template <int M>
void DirectRows<kDigits>::multiply_rows(const Matrix& weight, int pair, const Block* rows, float* y) const {
  const uint8_t* blocks = weight.pair(pair);
  const auto multiply_as = [&](auto format) {
    if constexpr (kDigits == 2 || takes_one_digit(format)) multiply_format<M, format>(blocks, rows, y);
  };
  for (int g = 0; g < 2; g += kGroupsAtOnce, y += kGroup, blocks += block_bytes(weight.format)) {
    switch (weight.format) {
      case kQ8: multiply_as(std::integral_constant<int, kQ8>()); break;
      case kQ6: multiply_as(std::integral_constant<int, kQ6>()); break;
      case kQ5: multiply_as(std::integral_constant<int, kQ5>()); break;
      default: multiply_as(std::integral_constant<int, kQ4>()); break;
    }
  }
}

template <int kDigits>
void DirectRows<kDigits>::multiply(const Matrix& weight, int pair, int first, int count, float* y) const {
  using Multiply = void (DirectRows::*)(const Matrix&, int, const Block*, float*) const;
  static constexpr auto kByRows = []<int... M>(std::integer_sequence<int, M...>) {
    return std::array<Multiply, sizeof...(M)>{&DirectRows::multiply_rows<M + 1>...};
  }(std::make_integer_sequence<int, kMost>());
  (this->*kByRows[count - 1])(weight, pair, data_.data() + static_cast<size_t>(first) * blocks_, y);
}

template class DirectRows<1>;
template class DirectRows<2>;

}  // namespace evospec

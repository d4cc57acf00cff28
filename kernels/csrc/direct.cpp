#include "direct.h"

#include <array>
#include <utility>

namespace evospec {

namespace {

constexpr float kSmallest = 1e-30f;  // a block below it counts as zeros: its inverse could overflow

// The offset of a format's codes.
constexpr int offset(int format) { return format == kQ4 ? 0 : format == kQ5 ? 16 : 128; }

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

template <int kDigits>
template <int M, int kFormat>
void DirectRows<kDigits>::multiply_format(const uint8_t* block, const Block* rows, Floats* acc) const {
  for (int b = 0; b < blocks_; ++b, block += block_bytes(kFormat)) {
    prefetch_ahead(block, kFormat);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(kFormat));
    const Floats s = load_half(scales);
    auto row = [&](int m) -> const Block& { return rows[static_cast<size_t>(m) * blocks_ + b]; };
    auto add_scaled = [&](const Ints* sums, Floats s) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[m] = multiply_add(to_floats(sums[m]), s * all(row(m).scale), acc[m]);
    };
    Ints sums[M];
    int shifts[M];
    if constexpr (kFormat == kQ8x2) {
      for (int m = 0; m < M; ++m) shifts[m] = 128 * row(m).code_sum[0];
      dot<kDigits, M, kFormat, 0, 4>(block, row, shifts, sums);
      add_scaled(sums, s);
      for (int m = 0; m < M; ++m) shifts[m] = 128 * row(m).code_sum[1];
      dot<kDigits, M, kFormat, 4, 8>(block, row, shifts, sums);
      add_scaled(sums, load_half(scales + kGroup));
    } else {
      for (int m = 0; m < M; ++m) shifts[m] = offset(kFormat) * (row(m).code_sum[0] + row(m).code_sum[1]);
      dot<kDigits, M, kFormat, 0, 8>(block, row, shifts, sums);
      add_scaled(sums, s);
    }
    if constexpr (kFormat == kQ4) {
      const Floats minima = load_half(scales + kGroup);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[m] = multiply_add(minima, all(row(m).sum), acc[m]);
    }
  }
}

template <int kDigits>
template <int M>
void DirectRows<kDigits>::multiply_rows(const Matrix& weight, int group, const Block* rows, float* y, int stride) const {
  Floats acc[M];
  for (int m = 0; m < M; ++m) acc[m] = all(0.0f);
  const uint8_t* data = weight.group(group);
  switch (weight.format) {
    case kQ8: multiply_format<M, kQ8>(data, rows, acc); break;
    case kQ8x2: multiply_format<M, kQ8x2>(data, rows, acc); break;
    case kQ5: multiply_format<M, kQ5>(data, rows, acc); break;
    default: multiply_format<M, kQ4>(data, rows, acc); break;
  }
  for (int m = 0; m < M; ++m) store(y + static_cast<size_t>(m) * stride, acc[m]);
}

template <int kDigits>
void DirectRows<kDigits>::multiply(const Matrix& weight, int group, int first, int count, float* y, int stride) const {
  using Multiply = void (DirectRows::*)(const Matrix&, int, const Block*, float*, int) const;
  static constexpr auto kByRows = []<int... M>(std::integer_sequence<int, M...>) {
    return std::array<Multiply, sizeof...(M)>{&DirectRows::multiply_rows<M + 1>...};
  }(std::make_integer_sequence<int, kDirectRows>());
  (this->*kByRows[count - 1])(weight, group, data_.data() + static_cast<size_t>(first) * blocks_, y, stride);
}

template class DirectRows<2>;
#ifdef __AVX512F__
template class DirectRows<1>;
#endif

}  // namespace evospec

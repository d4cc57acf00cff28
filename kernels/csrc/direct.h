// Products of quantised weights whose codes are multiplied as integers, without being expanded first.
//
// x is written as scale * (128 high + low) for each block of 32 k, with high and low in 8 bits: 15 bits below the
// block's largest value, where bf16 has 8. Or as scale * high, for half of the instructions, if the format takes_one_digit.
// Sums of a block are then exact integers, and float32 only adds up blocks, always in the same order: a row's result does
// not depend on how many rows are multiplied with it.
#pragma once

#include <vector>

#include "matrix.h"

#ifdef __AVX512F__
#include "dot_avx512.h"
#else
#include "dot_avx2.h"
#endif

namespace evospec {

// Rows of activations as the integers of a product. Every thread makes its own: that takes little, and shared ones
// would need another barrier.
template <int kDigits>
class DirectRows {
 public:
  // x: bf16 [rows][k]
  void assign(const bf16* x, int rows, int k);

  static constexpr int kMost = max_rows(kDigits);

  // y[m][column] = the product of row first + m with the 32 columns of a pair of groups, for count <= kMost rows.
  void multiply(const Matrix& weight, int pair, int first, int count, float* y) const;

 private:
  struct Block {  // 32 k of one row
    Digits<kDigits> digits;
    float scale;
    float sum;            // of the values
    int32_t code_sum[2];  // of the integers, k < 16 and the rest
    int32_t padding[kDigits == 2 ? 12 : 4];
  };
  static_assert(sizeof(Block) == (kDigits == 2 ? 128 : 64));

  template <int M>
  void multiply_rows(const Matrix& weight, int pair, const Block* rows, float* y) const;
  template <int M, int kFormat>
  void multiply_format(const uint8_t* blocks, const Block* rows, float* y) const;

  int blocks_ = 0;
  std::vector<Block> data_;  // [rows][blocks]
};

}  // namespace evospec

// Rows of GGUF quantised tensors (ggml block formats) as integer codes with scales, without rounding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

namespace evospec {

// ggml type numbers, as in the file.
enum GgmlType : int { kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14 };

// The packed format that holds a ggml type's codes exactly, or -1 where there is none.
int packed_format(int ggml_type);

size_t ggml_row_bytes(int ggml_type, int k);

// Decodes one row of k values; `out` has room for codes[k], scales[k / 16], minima[k / 32].
void decode_row(int ggml_type, const uint8_t* row, int k, RowCodes& out);

}  // namespace evospec

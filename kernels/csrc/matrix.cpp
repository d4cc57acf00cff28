#include "matrix.h"

#include <cpuid.h>

namespace evospec {

namespace {

inline uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float half_to_float(uint16_t value) { return _cvtsh_ss(value); }

void set_code(uint8_t* block, int format, int kk, int column, uint8_t code) {
  const int quad = kk / 4, p = column * 4 + kk % 4;
  if (has_whole_bytes(format)) {
    block[64 * quad + p] = code;
    return;
  }
  block[64 * (quad / 2) + p] |= static_cast<uint8_t>((code & 15) << (4 * (quad % 2)));
  if (format == kQ5) {
    reinterpret_cast<uint32_t*>(block + 256)[column] |= static_cast<uint32_t>(code >> 4) << fifth_bit(kk);
  }
}

int get_code(const uint8_t* block, int format, int kk, int column) {
  const int quad = kk / 4, p = column * 4 + kk % 4;
  if (has_whole_bytes(format)) return block[64 * quad + p];
  const int nibble = (block[64 * (quad / 2) + p] >> (4 * (quad % 2))) & 15;
  if (format == kQ4) return nibble;
  return nibble + static_cast<int>(16 * ((reinterpret_cast<const uint32_t*>(block + 256)[column] >> fifth_bit(kk)) & 1));
}

// Where the blocks of a row begin; from one to the next are two blocks.
size_t first_block(int format, int k, int row) {
  const size_t blocks_before = static_cast<size_t>(row / kPairColumns) * 2 * (k / kBlock) + row / kGroup % 2;
  return blocks_before * block_bytes(format);
}

}  // namespace

bool is_intel() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == signature_INTEL_ebx;
}

// AMD's first level waits for many lines at a time. Intel's for few: products of several rows would wait behind them.
#ifdef __AVX512F__
const bool ReadAhead::kToFirstLevel = !is_intel();
#else
const bool ReadAhead::kToFirstLevel = false;
#endif
const size_t ReadAhead::kDistance = kToFirstLevel ? 12288 : 4096;

void pack_codes(uint8_t* data, int k, int row, const RowCodes& codes) {
  const int column = row % kGroup;
  uint8_t* block = data + first_block(codes.format, k, row);
  for (int b = 0; b < k / kBlock; ++b, block += 2 * block_bytes(codes.format)) {
    for (int kk = 0; kk < kBlock; ++kk) set_code(block, codes.format, kk, column, codes.codes[b * kBlock + kk]);
    uint16_t* scales = reinterpret_cast<uint16_t*>(block + code_bytes(codes.format));
    scales[column] = to_half(codes.scales[2 * b]);
    if (codes.format == kQ6) scales[kGroup + column] = to_half(codes.scales[2 * b + 1]);
    if (codes.format == kQ4) scales[kGroup + column] = to_half(codes.minima[b]);
  }
}

// Packs weight rows row_map[r] <- source row r as bf16.
extern "C" void evo_pack_floats(uint8_t* data, const float* rows, const int32_t* row_map, int count, int k) {
  for (int r = 0; r < count; ++r, rows += k) {
    uint8_t* first = data + first_block(kBf16, k, row_map[r]);
    for (int i = 0; i < k; ++i) {
      const int kk = i % kBlock;
      bf16* block = reinterpret_cast<bf16*>(first + i / kBlock * 2 * block_bytes(kBf16));
      block[32 * (kk / 2) + 2 * (row_map[r] % kGroup) + kk % 2] = to_bf16(rows[i]);
    }
  }
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const int column = row % kGroup, format = matrix.format;
  const uint8_t* block = matrix.data + first_block(format, matrix.k, row);
  for (int b = 0; b < matrix.num_blocks(); ++b, block += 2 * block_bytes(format)) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(format));
    for (int kk = 0; kk < kBlock; ++kk) {
      float& value = out[b * kBlock + kk];
      if (format == kBf16) {
        value = to_float(reinterpret_cast<const bf16*>(block)[32 * (kk / 2) + 2 * column + kk % 2]);
        continue;
      }
      const int scale_index = column + (format == kQ6 && kk >= kBlock / 2 ? kGroup : 0);
      const float minimum = format == kQ4 ? half_to_float(scales[kGroup + column]) : 0.0f;
      const int code = get_code(block, format, kk, column) - code_offset(format);
      value = half_to_float(scales[scale_index]) * code + minimum;
    }
  }
}

}  // namespace evospec

// Rows of GGUF quantised tensors (ggml block formats) as integer codes with scales, without rounding of the codes. Scales
// become half precision, which holds those of blocks of 32 exactly.
#include <cmath>
#include <vector>

#include "matrix.h"

namespace evospec {

namespace {

// ggml type numbers, as in the file.
enum GgmlType : int { kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kMXFP4 = 39 };

inline float half_at(const uint8_t* bytes) {
  uint16_t value;
  std::memcpy(&value, bytes, 2);
  return _cvtsh_ss(value);
}

void set_scale(RowCodes& out, int block, float scale) {
  out.scales[2 * block] = scale;
  out.scales[2 * block + 1] = scale;
}

// Block of 32: low nibbles are values 0..15, high nibbles 16..31.
void nibbles(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 15;
    codes[i + 16] = packed[i] >> 4;
  }
}

void decode_q4_0(const uint8_t* block, int b, RowCodes& out) {  // half d; 16 bytes; w = d (q - 8)
  const float d = half_at(block);
  nibbles(block + 2, out.codes + 32 * b);
  set_scale(out, b, d);
  out.minima[b] = -8.0f * d;
}

void decode_q4_1(const uint8_t* block, int b, RowCodes& out) {  // half d, half m; 16 bytes; w = d q + m
  nibbles(block + 4, out.codes + 32 * b);
  set_scale(out, b, half_at(block));
  out.minima[b] = half_at(block + 2);
}

void decode_q5_0(const uint8_t* block, int b, RowCodes& out) {  // half d; 32 fifth bits; 16 bytes; w = d (q - 16)
  uint32_t fifth;
  std::memcpy(&fifth, block + 2, 4);
  uint8_t* codes = out.codes + 32 * b;
  nibbles(block + 6, codes);
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>(((fifth >> i) & 1) << 4);
  set_scale(out, b, half_at(block));
}

void decode_q8_0(const uint8_t* block, int b, RowCodes& out) {  // half d; 32 int8
  for (int i = 0; i < 32; ++i) out.codes[32 * b + i] = block[2 + i] ^ 0x80;  // int8 + 128
  set_scale(out, b, half_at(block));
}

// 256 values: half d, half dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles; w = d sc q - dmin m
void decode_q4_k(const uint8_t* block, int super, RowCodes& out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  const uint8_t *packed_scales = block + 4, *packed = block + 16;
  for (int sub = 0; sub < 8; ++sub) {
    uint8_t scale, minimum;
    if (sub < 4) {
      scale = packed_scales[sub] & 63;
      minimum = packed_scales[sub + 4] & 63;
    } else {
      scale = (packed_scales[sub + 4] & 15) | ((packed_scales[sub - 4] >> 6) << 4);
      minimum = (packed_scales[sub + 4] >> 4) | ((packed_scales[sub] >> 6) << 4);
    }
    uint8_t* codes = out.codes + 256 * super + 32 * sub;
    const uint8_t* bytes = packed + 32 * (sub / 2);
    for (int i = 0; i < 32; ++i) codes[i] = (sub % 2 ? bytes[i] >> 4 : bytes[i] & 15);
    set_scale(out, 8 * super + sub, d * scale);
    out.minima[8 * super + sub] = -dmin * minimum;
  }
}

// 256 values: 128 bytes of low nibbles, 64 bytes of high pairs, 16 int8 scales, half d; w = d sc (q - 32)
void decode_q6_k(const uint8_t* block, int super, RowCodes& out) {
  const uint8_t *low = block, *high = block + 128;
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float d = half_at(block + 208);
  for (int half = 0; half < 2; ++half, low += 64, high += 32) {
    uint8_t* codes = out.codes + 256 * super + 128 * half;
    for (int i = 0; i < 32; ++i) {
      codes[i] = static_cast<uint8_t>((low[i] & 15) | ((high[i] & 3) << 4));
      codes[i + 32] = static_cast<uint8_t>((low[i + 32] & 15) | (((high[i] >> 2) & 3) << 4));
      codes[i + 64] = static_cast<uint8_t>((low[i] >> 4) | (((high[i] >> 4) & 3) << 4));
      codes[i + 96] = static_cast<uint8_t>((low[i + 32] >> 4) | ((high[i] >> 6) << 4));
    }
  }
  for (int i = 0; i < 16; ++i) out.scales[16 * super + i] = d * scales[i];
}

// What nibbles stand for, plus 128: the numbers are not evenly spaced, so that only codes of 8 bits hold them.
constexpr uint8_t kNonLinear[] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

void non_linear(const uint8_t* packed, uint8_t* codes) {
  nibbles(packed, codes);
  for (int i = 0; i < 32; ++i) codes[i] = kNonLinear[codes[i]];
}

void decode_iq4_nl(const uint8_t* block, int b, RowCodes& out) {  // half d; 16 bytes; w = d (number of q)
  non_linear(block + 2, out.codes + 32 * b);
  set_scale(out, b, half_at(block));
}

// 256 values: half d, scales less 32 of 6 bits (8 high pairs, 8 low nibbles), 128 bytes; w = d sc (number of q)
void decode_iq4_xs(const uint8_t* block, int super, RowCodes& out) {
  const int high = block[2] | block[3] << 8;
  for (int sub = 0; sub < 8; ++sub) {
    const int scale = (block[4 + sub / 2] >> 4 * (sub % 2) & 15) | (high >> 2 * sub & 3) << 4;
    non_linear(block + 8 + 16 * sub, out.codes + 256 * super + 32 * sub);
    set_scale(out, 8 * super + sub, half_at(block) * (scale - 32));
  }
}

// Exponent e; 16 bytes of numbers with one bit after the point; w = 2^(e - 128) (twice the number). Half precision has
// exponents from -24 to 15: smaller scales become zero.
void decode_mxfp4(const uint8_t* block, int b, RowCodes& out) {
  constexpr uint8_t kTwice[] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};  // plus 16
  uint8_t* codes = out.codes + 32 * b;
  nibbles(block + 1, codes);
  for (int i = 0; i < 32; ++i) codes[i] = kTwice[codes[i]];
  set_scale(out, b, std::ldexp(1.0f, block[0] - 128));
}

using Decoder = void (*)(const uint8_t*, int, RowCodes&);

struct Layout {
  int ggml_type, format, values, bytes;
  Decoder decode;
};

constexpr Layout kLayouts[] = {
    {kQ4_0, kQ4, 32, 18, decode_q4_0},    {kQ4_1, kQ4, 32, 20, decode_q4_1},    {kQ5_0, kQ5, 32, 22, decode_q5_0},
    {kQ8_0, kQ8, 32, 34, decode_q8_0},    {kQ4_K, kQ4, 256, 144, decode_q4_k},  {kQ6_K, kQ6, 256, 210, decode_q6_k},
    {kIQ4_NL, kQ8, 32, 18, decode_iq4_nl}, {kIQ4_XS, kQ8, 256, 136, decode_iq4_xs}, {kMXFP4, kQ5, 32, 17, decode_mxfp4},
};

const Layout* find_layout(int ggml_type) {
  for (const Layout& layout : kLayouts) {
    if (layout.ggml_type == ggml_type) return &layout;
  }
  return nullptr;
}

}  // namespace

extern "C" {

// The packed format that holds a ggml type's codes exactly, or -1 where there is none.
int evo_packed_format(int ggml_type) {
  const Layout* layout = find_layout(ggml_type);
  return layout ? layout->format : -1;
}

// Packs weight rows row_map[i] <- source row i (GGUF blocks) into `data`, which starts as zeros.
void evo_pack_ggml(uint8_t* data, int ggml_type, const uint8_t* rows, const int32_t* row_map, int count, int k) {
  const Layout* layout = find_layout(ggml_type);
  std::vector<uint8_t> codes(k);
  std::vector<float> scales(k / 16), minima(k / 32);
  RowCodes out{layout->format, codes.data(), scales.data(), minima.data()};
  for (int i = 0; i < count; ++i) {
    for (int b = 0; b < k / layout->values; ++b, rows += layout->bytes) layout->decode(rows, b, out);
    pack_codes(data, k, row_map[i], out);
  }
}

}  // extern "C"

}  // namespace evospec

#include "linear.h"

#include <algorithm>

#include "direct.h"
#include "rows.h"
#include "tiles.h"

#ifdef __AVX512F__
#include "expand_avx512.h"
#endif

namespace evospec {

namespace {

// Whether codes are ever expanded to be multiplied.
#ifdef __AVX512F__
constexpr bool kExpandsCodes = true;
#else
constexpr bool kExpandsCodes = false;
void expand_blocks(const Matrix&, int, int, int, const ReadAhead&, bf16*) {}
#endif

constexpr int kMostTileRows = 512;  // that blocks are multiplied with, one after the other
constexpr int kBlocksOfFewRows = 4, kBlocksAtOnce = 8;  // that are expanded together

struct Scratch {  // per thread, grows to the largest use
  DirectRows<2> direct;
  DirectRows<1> direct_one_digit;
  alignas(64) float y[kMostTileRows * kPairColumns];
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

// ---- what happens to 32 columns of one row ----

Floats gated(Epilogue epilogue, Floats gate, Floats up) {
  if (epilogue == Epilogue::kSiluMul) return silu(gate) * up;
  return epilogue == Epilogue::kGeluMul ? gelu(gate) * up : swiglu_oai(gate, up);
}

// y [count][32]: what rows `row` .. of the product have in the 32 columns of a pair of groups.
void finish_rows(const Linear& op, int row, int count, int pair, const float* y) {
  const int column = pair * kPairColumns;
  const float* bias = op.weight->bias;
  const Floats bias0 = bias == nullptr ? all(0.0f) : load(bias + column);
  const Floats bias1 = bias == nullptr ? all(0.0f) : load(bias + column + kGroup);
  if (is_gated(op.epilogue)) {
    bf16* out = static_cast<bf16*>(op.out) + static_cast<size_t>(row) * op.stride + column / 2;
    for (int m = 0; m < count; ++m, y += kPairColumns, out += op.stride) {
      store_bf16(out, gated(op.epilogue, load(y) + bias0, load(y + kGroup) + bias1));
    }
    return;
  }
  const Mask lanes0 = lanes_from(column, op.weight->n), lanes1 = lanes_from(column + kGroup, op.weight->n);
  float* out = static_cast<float*>(op.out) + static_cast<size_t>(row) * op.stride + column;
  for (int m = 0; m < count; ++m, y += kPairColumns, out += op.stride) {
    Floats y0 = load(y) + bias0, y1 = load(y + kGroup) + bias1;
    if (op.epilogue == Epilogue::kAdd) {
      y0 = y0 + load_lanes(lanes0, out);
      y1 = y1 + load_lanes(lanes1, out + kGroup);
    }
    store_lanes(out, lanes0, y0);
    store_lanes(out + kGroup, lanes1, y1);
  }
}

// ---- any number of rows ----

// Blocks first .. first + count - 1 of a pair as tiles [count][2][16][32]: as they lie in memory, or in `room`.
const bf16* tiles_of(const Matrix& weight, int pair, int first, int count, const ReadAhead& ahead, bf16* room) {
  if (weight.format == kBf16) {
    return reinterpret_cast<const bf16*>(weight.pair(pair)) + static_cast<size_t>(first) * kBlock * kPairColumns;
  }
  if constexpr (kExpandsCodes) expand_blocks(weight, pair, first, count, ahead, room);
  return room;
}

// One pair of groups times rows `row` .. row + count - 1. A few blocks are expanded, then multiplied with all rows: the
// processor runs the one beside the other, memory is read all the while, and tiles stay in the first-level cache.
void tile_pair(const Linear& op, int pair, int row, int count, const ReadAhead& ahead) {
  const Matrix& weight = *op.weight;
  const int blocks = weight.num_blocks();
  const bool stay = count <= kMaxTileRows;  // in the tile registers, from the first block to the last
  const int at_once = !stay ? kBlocksAtOnce : weight.format == kBf16 ? blocks : kBlocksOfFewRows;
  alignas(64) bf16 expanded[kBlocksAtOnce * kBlock * kPairColumns];
  float* const y = scratch().y;
  for (int b = 0; b < blocks; b += at_once) {
    const int size = std::min(at_once, blocks - b);
    const bf16* const tiles = tiles_of(weight, pair, b, size, ahead, expanded);
    for (int first = 0; first < count; first += kMaxTileRows) {
      const TileProduct product{std::min(count - first, kMaxTileRows), weight.k, y + first * kPairColumns};
      if (b == 0) {
        product.begin();
      } else if (!stay) {
        product.resume();
      }
      product.add(op.x + static_cast<size_t>(row + first) * weight.k + b * kBlock, tiles, size);
      if (!stay || b + size == blocks) product.complete();
    }
  }
  finish_rows(op, row, count, pair, y);
}

// As many rows as stay in the second-level cache while some pairs pass by, beside those of another thread; for vectors,
// which need them more often, in the first.
int rows_at_once(int k) {
  if (!has_amx()) return kMaxTileRows;
  constexpr int kCacheBytes = 1024 * 1024;
  const int fitting = kCacheBytes / (k * static_cast<int>(sizeof(bf16)));
  return std::clamp(fitting / kMaxTileRows * kMaxTileRows, kMaxTileRows, kMostTileRows);
}

void tile_pairs(const Linear& op, int begin, int end, const ReadAhead& ahead) {
  const int most = rows_at_once(op.weight->k);
  for (int row = 0; row < op.rows; row += most) {
    for (int pair = begin; pair < end; ++pair) tile_pair(op, pair, row, std::min(most, op.rows - row), ahead);
  }
}

// As many pairs as fit in the second-level cache beside the rows themselves, up to 8.
int pairs_at_once(const Matrix& weight) {
  constexpr size_t kCacheBytes = 1280 * 1024, kMost = 8;
  return static_cast<int>(std::clamp<size_t>(kCacheBytes / weight.pair_bytes(), 1, kMost));
}

// ---- codes as they are ----

constexpr int kRowsAtOnce = 48;  // their integers stay in the caches while some pairs are multiplied with them
constexpr int kRowsSetAtOnce = 16;

bool has_one_digit(const Matrix& weight) { return weight.digits == 1 && takes_one_digit(weight.format); }

int num_direct_rows(const Linear& op) {
  if (op.weight->format == kBf16) return 0;
  return has_amx() ? std::min(op.num_direct, op.rows) : op.rows;
}

// Fewer are multiplied by vectors in less time, to the same bits.
constexpr int kFewestTileRows = 14;

// How many of a product's rows AMX's tiles multiply at a time as they are; 0: vectors do.
int rows_of_tiles(const Linear& op) {
  if (!has_amx() || op.rows < kFewestTileRows || op.weight->format == kQ6) return 0;
  const int parts = (op.rows + kMaxTileRows - 1) / kMaxTileRows;
  return (op.rows + parts - 1) / parts;
}

template <typename Rows>
void direct_pair(const Linear& op, const Rows& rows, int pair, int begin, int end, int tile_rows,
                 const ReadAhead& ahead) {
  float* y = scratch().y;
  if (tile_rows > 0) {
    for (int count; begin < end; begin += count) {
      count = std::min(tile_rows, end - begin);
      rows.multiply_by_tiles(*op.weight, pair, begin, count, tile_rows, ahead, y);
      finish_rows(op, begin, count, pair, y);
    }
    return;
  }
  in_equal_parts(end - begin, Rows::kMost, [&](int first, int count) {
    rows.multiply(*op.weight, pair, begin + first, count, ahead, y);
    finish_rows(op, begin + first, count, pair, y);
  });
}

template <typename Rows>
void direct_pairs(const Linear& op, const Rows& rows, int begin, int end, int tile_rows, const ReadAhead& ahead) {
  const int most = tile_rows > 0 ? kRowsAtOnce / tile_rows * tile_rows : kRowsAtOnce;
  for (int row = 0; row < op.rows; row += most) {
    for (int pair = begin; pair < end; ++pair) {
      direct_pair(op, rows, pair, row, std::min(row + most, op.rows), tile_rows, ahead);
    }
  }
}

// The integers of all rows. A few rows take less time than waiting for each other.
template <typename Rows>
void set_rows(Team& team, const Linear& op, Rows& rows) {
  const bool together = op.room != nullptr && op.rows > kRowsAtOnce && team.size() > 1;
  rows.begin(op.rows, op.weight->k, together ? op.room : nullptr);
  if (!together) return rows.set(op.x, 0, op.rows);
  team.work_ranges(op.rows, kRowsSetAtOnce, [&](int first, int last, int) { rows.set(op.x, first, last); });
  team.barrier();
}

}  // namespace

Linear Linear::first(int count) const {
  Linear part = *this;
  part.rows = count;
  return part;
}

Linear Linear::behind(int count) const {
  Linear part = *this;
  part.x += static_cast<size_t>(count) * weight->k;
  part.rows -= count;
  const size_t skipped = static_cast<size_t>(count) * stride;
  part.out = is_gated(epilogue) ? static_cast<void*>(static_cast<bf16*>(out) + skipped) : static_cast<float*>(out) + skipped;
  return part;
}

void linear(Team& team, const Linear& op) {
  const int num_direct = num_direct_rows(op);
  const Linear direct = op.first(num_direct), rest = op.behind(num_direct);
  const bool one_digit = has_one_digit(*op.weight);
  if (num_direct > 0 && one_digit) set_rows(team, direct, scratch().direct_one_digit);
  if (num_direct > 0 && !one_digit) set_rows(team, direct, scratch().direct);
  const int tile_rows = rows_of_tiles(direct);
  const bool has_both = tile_rows > 0 && rest.rows > 0;
  if (tile_rows > 0) configure_integer_tiles(tile_rows);
  if (tile_rows == 0 && rest.rows > 0) configure_tiles(rest.rows);
  const bool many = num_direct > kRowsAtOnce || rest.rows > rows_at_once(op.weight->k);
  const int pairs = op.weight->num_pairs();
  const int step = many ? pairs_at_once(*op.weight) : 1;
  const uint8_t* const next = op.next == nullptr ? nullptr : op.next->pair(team.first_item(op.next->num_pairs()));
  bool is_first = true;
  team.work_ranges(pairs, step, [&](int pair, int last, int share_end) {
    const ReadAhead ahead{op.weight->pair(share_end), next};
    if (is_first) ahead.prefetch_first(op.weight->pair(pair));
    if (has_both && !is_first) configure_integer_tiles(tile_rows);
    is_first = false;
    if (one_digit) {
      direct_pairs(direct, scratch().direct_one_digit, pair, last, tile_rows, ahead);
    } else {
      direct_pairs(direct, scratch().direct, pair, last, tile_rows, ahead);
    }
    if (has_both) configure_tiles(rest.rows);
    tile_pairs(rest, pair, last, ahead);
  });
  if (tile_rows > 0 || rest.rows > 0) release_tiles();
}

void linear_pair(const Linear& op, int row, int pair) {
  const Linear one = op.behind(row).first(1);
  const ReadAhead ahead{op.weight->pair(pair + 1), nullptr};
  if (num_direct_rows(one) == 0) {
    configure_tiles(1);
    tile_pair(one, pair, 0, 1, ahead);
    return release_tiles();
  }
  const auto multiply = [&](auto& rows) {
    rows.begin(1, one.weight->k, nullptr);
    rows.set(one.x, 0, 1);
    direct_pair(one, rows, pair, 0, 1, 0, ahead);
  };
  if (has_one_digit(*one.weight)) return multiply(scratch().direct_one_digit);
  multiply(scratch().direct);
}

}  // namespace evospec

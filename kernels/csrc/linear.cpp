#include "linear.h"

#include <algorithm>
#include <vector>

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

struct Scratch {  // per thread, grows to the largest use
  std::vector<bf16> tiles;  // expanded groups
  DirectRows<2> direct;
  DirectRows<1> direct_one_digit;
  alignas(64) float y[kMaxTileRows * kPairColumns];
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

void finish_tiles(const Linear& op, const TileProduct& product, int row, int pair) {
  product.complete();
  finish_rows(op, row, product.rows, pair, product.y);
}

// One pair of groups times up to 32 rows. A few blocks are expanded, then multiplied: the processor runs the one
// beside the other, memory is read all the while, and tiles stay in the first-level cache.
void tile_pair(const Linear& op, int pair, const ReadAhead& ahead) {
  const Matrix& weight = *op.weight;
  const int blocks = weight.num_blocks();
  const TileProduct product{op.rows, weight.k, scratch().y};
  product.begin();
  if (weight.format == kBf16) {
    product.add(op.x, reinterpret_cast<const bf16*>(weight.pair(pair)), blocks);
  } else if constexpr (kExpandsCodes) {
    constexpr int kAtOnce = 4;
    alignas(64) bf16 tiles[kAtOnce * kBlock * kPairColumns];
    for (int b = 0; b < blocks; b += kAtOnce) {
      const int count = std::min(kAtOnce, blocks - b);
      expand_blocks(weight, pair, b, count, ahead, tiles);
      product.add(op.x + b * kBlock, tiles, count);
    }
  }
  finish_tiles(op, product, 0, pair);
}

// The tiles of the pairs begin .. end - 1; those of kBf16 lie in memory as they are.
const bf16* tiles_of_pairs(const Matrix& weight, int begin, int end, const ReadAhead& ahead) {
  if constexpr (kExpandsCodes) {
    if (weight.format != kBf16) {
      std::vector<bf16>& tiles = scratch().tiles;
      const size_t pair_size = static_cast<size_t>(weight.k) * kPairColumns;
      if (tiles.size() < (end - begin) * pair_size) tiles.resize((end - begin) * pair_size);
      for (int pair = begin; pair < end; ++pair) {
        expand_blocks(weight, pair, 0, weight.num_blocks(), ahead, tiles.data() + (pair - begin) * pair_size);
      }
      return tiles.data();
    }
  }
  return reinterpret_cast<const bf16*>(weight.pair(begin));
}

// Many rows. For each 32 of them all pairs begin .. end - 1 in turn: the rows then come from the first-level cache, and
// the weights, which lie in a row, from the second. The other way round, rows are read from afar for every pair.
void tile_pairs(const Linear& op, int begin, int end, const ReadAhead& ahead) {
  const Matrix& weight = *op.weight;
  const bf16* tiles = tiles_of_pairs(weight, begin, end, ahead);
  for (int row = 0; row < op.rows; row += kMaxTileRows) {
    const TileProduct product{std::min(op.rows - row, kMaxTileRows), weight.k, scratch().y};
    const bf16* blocks = tiles;
    for (int pair = begin; pair < end; ++pair, blocks += static_cast<size_t>(weight.k) * kPairColumns) {
      product.begin();
      product.add(op.x + static_cast<size_t>(row) * weight.k, blocks, weight.num_blocks());
      finish_tiles(op, product, row, pair);
    }
  }
}

// As many pairs as fit in the second-level cache beside the rows themselves, up to 8: as codes, or expanded.
int pairs_at_once(const Linear& op, bool direct) {
  constexpr size_t kCacheBytes = 1280 * 1024, kMost = 8;
  const size_t expanded = static_cast<size_t>(op.weight->k) * kPairColumns * sizeof(bf16);
  const size_t pair_bytes = direct ? op.weight->pair_bytes() : expanded;
  return static_cast<int>(std::clamp<size_t>(kCacheBytes / pair_bytes, 1, kMost));
}

// ---- codes as they are ----

constexpr int kRowsAtOnce = 48;  // their integers stay in the caches while some pairs are multiplied with them
constexpr int kRowsSetAtOnce = 16;

bool has_one_digit(const Matrix& weight) { return weight.digits == 1 && takes_one_digit(weight.format); }

int num_direct_rows(const Linear& op) {
  if (op.weight->format == kBf16) return 0;
  return has_amx() ? std::min(op.num_direct, op.rows) : op.rows;
}

template <typename Rows>
void direct_pair(const Linear& op, const Rows& rows, int pair, int begin, int end, const ReadAhead& ahead) {
  float* y = scratch().y;
  in_equal_parts(end - begin, Rows::kMost, [&](int first, int count) {
    rows.multiply(*op.weight, pair, begin + first, count, ahead, y);
    finish_rows(op, begin + first, count, pair, y);
  });
}

template <typename Rows>
void direct_pairs(const Linear& op, const Rows& rows, int begin, int end, const ReadAhead& ahead) {
  for (int row = 0; row < op.rows; row += kRowsAtOnce) {
    for (int pair = begin; pair < end; ++pair) {
      direct_pair(op, rows, pair, row, std::min(row + kRowsAtOnce, op.rows), ahead);
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
  if (rest.rows > 0) configure_tiles(rest.rows);
  const bool many = num_direct > kRowsAtOnce || rest.rows > kMaxTileRows;
  const int pairs = op.weight->num_pairs();
  const int step = many ? pairs_at_once(op, rest.rows == 0) : 1;
  const uint8_t* const next = op.next == nullptr ? nullptr : op.next->pair(team.first_item(op.next->num_pairs()));
  bool is_first = true;
  team.work_ranges(pairs, step, [&](int pair, int last, int share_end) {
    const ReadAhead ahead{op.weight->pair(share_end), next};
    if (is_first) ahead.prefetch_first(op.weight->pair(pair));
    is_first = false;
    if (one_digit) {
      direct_pairs(direct, scratch().direct_one_digit, pair, last, ahead);
    } else {
      direct_pairs(direct, scratch().direct, pair, last, ahead);
    }
    if (rest.rows > kMaxTileRows) {
      tile_pairs(rest, pair, last, ahead);
    } else if (rest.rows > 0) {
      for (int one = pair; one < last; ++one) tile_pair(rest, one, ahead);
    }
  });
  if (rest.rows > 0) release_tiles();
}

}  // namespace evospec

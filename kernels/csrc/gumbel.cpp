#include "gumbel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -std::numeric_limits<float>::max();  // excludes -inf
constexpr uint32_t kTokenStep = 0x9E3779B1, kFirstFactor = 0x7FEB352D, kSecondFactor = 0x846CA68B;
constexpr int kSmallestPiece = 8192;
constexpr int kBlock = 512;  // columns that are sifted before any is hashed
constexpr float kMostNoise = 22.9f;  // noise(INT32_MAX) is 22.87

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t row_key(int64_t seed, int64_t position) {
  return mix64(mix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(position) * 0x9E3779B97F4A7C15ull);
}

Ints all_of_bits(uint32_t bits) { return all(static_cast<int32_t>(bits)); }

Ints mix32(Ints x) {
  x = exclusive_or(x, shift_right<16>(x));
  x = times(x, all_of_bits(kFirstFactor));
  x = exclusive_or(x, shift_right<15>(x));
  x = times(x, all_of_bits(kSecondFactor));
  return exclusive_or(x, shift_right<16>(x));
}

// x = int32 whose uniform u the noise comes from.
Ints hash_tokens(Ints token_ids, uint64_t key) {
  Ints x = times(token_ids, all_of_bits(kTokenStep));
  x = mix32(plus(x, all_of_bits(static_cast<uint32_t>(key))));
  return mix32(exclusive_or(x, all_of_bits(static_cast<uint32_t>(key >> 32))));
}

float noise(int32_t hash) {
  const double u = (static_cast<double>(hash) + (0x1p31 + 0.5)) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(u)));
}

// At least noise(hash), and less than 0.6 above it where noise is positive: -log(-log u) <= -log v for v = 1 - u, and
// the bits of a float read as an integer are its logarithm to base 2, too low by up to 0.09.
Floats noise_bound(Ints hash) {
  constexpr float kLn2 = 0.69314718f, kRoom = 1e-4f;  // for rounding
  // 2^32 v - 0.5 as an unsigned integer.
  const Floats v = unsigned_to_floats(exclusive_or(hash, all(0x7FFFFFFF)));
  return subtract_product(all(kLn2 * (127 + 32) + kRoom), to_floats(bits_of(v)), all(kLn2 * 0x1p-23f));
}

struct Choice {
  float score = -kInfinity;
  int32_t token_id = std::numeric_limits<int32_t>::max();

  void offer(float other_score, int32_t other_id) {
    if (other_score < score || (other_score == score && other_id >= token_id)) return;
    score = other_score;
    token_id = other_id;
  }
};

struct Piece {  // of one row
  const float* logits;
  const int32_t* token_ids;  // or null: first_column + i
  const uint32_t* allowed;  // of the whole row, or null
  int first_column;
  int size;
  mutable Mask undefined = 0;  // lanes in which `for_each_alive` has seen NaN or +inf

  // visit(lanes, x, i) for every 16 from `begin` to `end`: the lanes of tokens that may be chosen, if there are any, their
  // logits x and where they begin.
  template <typename Visit>
  void for_each_alive(int begin, int end, float least, Visit visit) const {
    for_each_vector(logits, begin, end, [&](int i, Mask lanes, Floats x) {
      undefined |= lanes & not_less(x, all(kInfinity));
      const Mask alive = lanes & allowed_lanes(allowed, first_column + i) & at_least(x, all(least));
      if (alive != 0) visit(alive, x, i);
    });
  }

  Ints ids(int i) const {
    return token_ids == nullptr ? numbered_from(first_column + i) : load_lanes(lanes_from(i, size), token_ids + i);
  }
};

Choice choose_greedily(const Piece& piece, float least) {
  Floats best = all(-kInfinity);
  Ints best_ids = all(std::numeric_limits<int32_t>::max());
  piece.for_each_alive(0, piece.size, least, [&](Mask alive, Floats x, int i) {
    const Mask candidates = alive & at_least(x, best);
    if (candidates == 0) return;
    const Ints ids = piece.ids(i);
    const Mask wins = candidates & (more(x, best) | less(ids, best_ids));
    best = choose(wins, x, best);
    best_ids = choose(wins, ids, best_ids);
  });
  const float score = largest(best);
  return {score, smallest(equal(best, all(score)), best_ids)};
}

// The tokens of a block that may still win.
struct Sifted {
  alignas(64) float logits[kBlock + 16];
  alignas(64) int32_t token_ids[kBlock + 16];
  int size;
};

// The best of a row's tokens by logit / temperature + noise. Logarithms are taken only for tokens whose bound reaches
// the best score so far.
class RandomChoice {
 public:
  RandomChoice(float temperature, float least, uint64_t key)
      : temperature_(temperature),
        least_(least),
        inverse_(all(1.0f / temperature)),
        room_(all(0x1p-21f / temperature)),
        key_(key) {}

  Choice from_all(const Piece& piece) {
    piece.for_each_alive(0, piece.size, least_, [&](Mask alive, Floats x, int i) { offer(alive, x, piece.ids(i)); });
    return best_;
  }

  // The same. Hashes only tokens that the most noise there is could make the best so far: faster where those are few.
  Choice from_sifted(const Piece& piece) {
    Sifted block;
    for (int begin = 0; begin < piece.size; begin += kBlock) {
      sift(piece, begin, std::min(begin + kBlock, piece.size), block);
      for (int i = 0; i < block.size; i += 16) {
        offer(lanes_from(i, block.size), load(block.logits + i), load(block.token_ids + i));
      }
    }
    return best_;
  }

 private:
  // Whether x / temperature and a noise of at most that may be the best so far. This multiplies where the score divides, and both round:
  // room_ is a part of |x| that covers this many times over. "Not less": a bound that overflowed to NaN may.
  Mask may_win(Floats x, Floats most_noise) const {
    return not_less(multiply_add(absolute(x), room_, multiply_add(x, inverse_, most_noise)), all(best_.score));
  }

  void offer(Mask lanes, Floats x, Ints ids) {
    const Ints hashes = hash_tokens(ids, key_);
    unsigned candidates = lanes & may_win(x, noise_bound(hashes));
    if (candidates == 0) return;
    alignas(64) float logit[16];
    alignas(64) int32_t hash[16], token_id[16];
    store(logit, x);
    store(hash, hashes);
    store(token_id, ids);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      best_.offer(logit[lane] / temperature_ + noise(hash[lane]), token_id[lane]);
    }
  }

  void sift(const Piece& piece, int begin, int end, Sifted& out) const {
    out.size = 0;
    piece.for_each_alive(begin, end, least_, [&](Mask alive, Floats x, int i) {
      const Mask taken = alive & may_win(x, all(kMostNoise));
      if (taken == 0) return;
      store_packed(out.logits + out.size, taken, x);
      store_packed(out.token_ids + out.size, taken, piece.ids(i));
      out.size += __builtin_popcount(taken);
    });
  }

  const float temperature_, least_;
  const Floats inverse_, room_;
  const uint64_t key_;
  Choice best_;
};

Choice choose_randomly(const Piece& piece, float temperature, float least, uint64_t key) {
  RandomChoice choice(temperature, std::max(kLowest, least), key);  // no limit where it is NaN
  // Where nothing is cut off from a flat distribution, most may win.
  const bool may_many_win = least == -kInfinity && temperature >= 1.0f;
  return may_many_win ? choice.from_all(piece) : choice.from_sifted(piece);
}

// What is left to choose where no token is alive.
int32_t lowest_id(const int32_t* token_ids, int count) {
  return token_ids == nullptr ? 0 : *std::min_element(token_ids, token_ids + count);
}

}  // namespace

extern "C" void evo_gumbel_argmax(Team* team, const LogitRows& logits, const GumbelRows& how, int64_t* out) {
  // Rows in pieces where there are few of them; the best of a row does not depend on how it is cut.
  const int threads = team == nullptr ? 1 : team->size();
  const int wanted = threads == 1 ? 1 : (4 * threads + logits.rows - 1) / logits.rows;
  const int size = std::max(kSmallestPiece, (logits.columns / wanted + 15) / 16 * 16);
  const int pieces = std::max(1, (logits.columns + size - 1) / size);
  const size_t elements = static_cast<size_t>(logits.rows) * logits.columns;
  std::vector<float> thresholds;
  if (how.limits != nullptr && pieces > 1) {
    thresholds.resize(logits.rows);
    evo_kept_thresholds(team, logits, *how.limits, thresholds.data());
  }
  const auto least_in = [&](int row) {
    if (how.limits == nullptr) return -kInfinity;
    return pieces > 1 ? thresholds[row] : kept_threshold(logits, *how.limits, row);  // the row stays in the cache
  };
  const auto ids_of = [&](int row) {
    return how.token_ids == nullptr ? nullptr : how.token_ids + static_cast<size_t>(row) * logits.columns;
  };
  std::vector<Choice> best(static_cast<size_t>(logits.rows) * pieces);
  std::vector<uint8_t> undefined(best.size());
  for_each_item(team, logits.rows * pieces, elements, [&](int item) {
    const int row = item / pieces, begin = item % pieces * size;
    const int32_t* ids = ids_of(row) == nullptr ? nullptr : ids_of(row) + begin;
    const Piece piece{logits.row(row) + begin, ids, logits.allowed_in(row), begin,
                      std::min(size, logits.columns - begin)};
    const bool is_greedy = how.temperatures == nullptr || how.temperatures[row] == 0.0f;
    best[item] = is_greedy ? choose_greedily(piece, std::max(kLowest, least_in(row)))
                           : choose_randomly(piece, how.temperatures[row], least_in(row),
                                             row_key(how.seeds[row], how.positions[row]));
    undefined[item] = piece.undefined != 0;
  });
  for (int row = 0; row < logits.rows; ++row) {
    Choice choice;
    for (int p = 0; p < pieces; ++p) choice.offer(best[row * pieces + p].score, best[row * pieces + p].token_id);
    const bool found = choice.token_id != std::numeric_limits<int32_t>::max();
    out[row] = found ? choice.token_id : lowest_id(ids_of(row), logits.columns);
    if (how.undefined == nullptr) continue;
    const uint8_t* of_row = undefined.data() + static_cast<size_t>(row) * pieces;
    how.undefined[row] = std::any_of(of_row, of_row + pieces, [](uint8_t one) { return one != 0; });
  }
}

}  // namespace evospec

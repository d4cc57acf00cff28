#include "gumbel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace evospec {

namespace {

constexpr uint32_t kTokenStep = 0x9E3779B1, kFirstFactor = 0x7FEB352D, kSecondFactor = 0x846CA68B;
constexpr int kSmallestPiece = 8192;

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t row_key(int64_t seed, int64_t position) {
  return mix64(mix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(position) * 0x9E3779B97F4A7C15ull);
}

__m512i mix32(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kFirstFactor)));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kSecondFactor)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// x = int32 whose uniform u the noise comes from.
__m512i hash_tokens(__m512i token_ids, uint64_t key) {
  __m512i x = _mm512_mullo_epi32(token_ids, _mm512_set1_epi32(static_cast<int>(kTokenStep)));
  x = mix32(_mm512_add_epi32(x, _mm512_set1_epi32(static_cast<int>(key))));
  return mix32(_mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(key >> 32))));
}

float noise(int32_t hash) {
  const double u = (static_cast<double>(hash) + (0x1p31 + 0.5)) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(u)));
}

// At least noise(hash), and less than 0.6 above it where noise is positive: -log(-log u) <= -log v for v = 1 - u, and
// the bits of a float read as an integer are its logarithm to base 2, too low by up to 0.09.
__m512 noise_bound(__m512i hash) {
  constexpr float kLn2 = 0.69314718f, kRoom = 1e-4f;  // for rounding
  // 2^32 v - 0.5 as an unsigned integer.
  const __m512 v = _mm512_cvtepu32_ps(_mm512_xor_si512(hash, _mm512_set1_epi32(0x7FFFFFFF)));
  const __m512 bits = _mm512_cvtepi32_ps(_mm512_castps_si512(v));
  return _mm512_fnmadd_ps(bits, _mm512_set1_ps(kLn2 * 0x1p-23f), _mm512_set1_ps(kLn2 * (127 + 32) + kRoom));
}

struct Choice {
  float score = -std::numeric_limits<float>::infinity();
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

  // Tokens that may be chosen, of 16 from i on whose logits are x.
  __mmask16 alive(int i, __m512 x, float least) const {
    const __mmask16 lanes = lanes_from(i, size) & allowed_lanes(allowed, first_column + i);
    return _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(least), _CMP_GE_OQ);
  }

  __m512i ids(int i) const {
    if (token_ids != nullptr) return _mm512_maskz_loadu_epi32(lanes_from(i, size), token_ids + i);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(first_column + i));
  }
};

Choice choose_greedily(const Piece& piece, float least) {
  __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512i best_ids = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  for (int i = 0; i < piece.size; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes_from(i, piece.size), piece.logits + i);
    const __mmask16 not_less = _mm512_mask_cmp_ps_mask(piece.alive(i, x, least), x, best, _CMP_GE_OQ);
    if (not_less == 0) continue;
    const __m512i ids = piece.ids(i);
    const __mmask16 more = _mm512_mask_cmp_ps_mask(not_less, x, best, _CMP_GT_OQ);
    const __mmask16 wins = more | _mm512_mask_cmplt_epi32_mask(not_less, ids, best_ids);
    best = _mm512_mask_mov_ps(best, wins, x);
    best_ids = _mm512_mask_mov_epi32(best_ids, wins, ids);
  }
  const float score = _mm512_reduce_max_ps(best);
  const __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(score), _CMP_EQ_OQ);
  return {score, _mm512_mask_reduce_min_epi32(equal, best_ids)};
}

// Logarithms are taken only for tokens whose bound reaches the best score so far.
Choice choose_at_random(const Piece& piece, float temperature, float least, uint64_t key) {
  const __m512 inverse = _mm512_set1_ps(1.0f / temperature);
  // The bound multiplies where the score divides, and both round: a part of |x| that covers this many times over.
  const __m512 room = _mm512_set1_ps(0x1p-21f / temperature);
  Choice best;
  for (int i = 0; i < piece.size; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes_from(i, piece.size), piece.logits + i);
    const __mmask16 alive = piece.alive(i, x, least);
    if (alive == 0) continue;
    const __m512i ids = piece.ids(i), hashes = hash_tokens(ids, key);
    const __m512 bound = _mm512_fmadd_ps(_mm512_abs_ps(x), room, _mm512_fmadd_ps(x, inverse, noise_bound(hashes)));
    // "Not less": a bound that overflowed to NaN is a candidate.
    unsigned candidates = _mm512_mask_cmp_ps_mask(alive, bound, _mm512_set1_ps(best.score), _CMP_NLT_UQ);
    if (candidates == 0) continue;
    alignas(64) int32_t hash[16], token_id[16];
    _mm512_store_si512(hash, hashes);
    _mm512_store_si512(token_id, ids);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      best.offer(piece.logits[i + lane] / temperature + noise(hash[lane]), token_id[lane]);
    }
  }
  return best;
}

// What is left to choose where no token is alive.
int32_t lowest_id(const int32_t* token_ids, int count) {
  return token_ids == nullptr ? 0 : *std::min_element(token_ids, token_ids + count);
}

}  // namespace

void gumbel_argmax(Team* team, const LogitRows& logits, const GumbelRows& how, int64_t* out) {
  // Rows in pieces where there are few of them; the best of a row does not depend on how it is cut.
  const int threads = team == nullptr ? 1 : team->size();
  const int wanted = threads == 1 ? 1 : (4 * threads + logits.rows - 1) / logits.rows;
  const int size = std::max(kSmallestPiece, (logits.columns / wanted + 15) / 16 * 16);
  const int pieces = std::max(1, (logits.columns + size - 1) / size);
  std::vector<Choice> best(static_cast<size_t>(logits.rows) * pieces);
  const size_t elements = static_cast<size_t>(logits.rows) * logits.columns;
  const auto ids_of = [&](int row) {
    return how.token_ids == nullptr ? nullptr : how.token_ids + static_cast<size_t>(row) * logits.columns;
  };
  for_each_item(team, logits.rows * pieces, elements, [&](int item) {
    const int row = item / pieces, begin = item % pieces * size;
    const int32_t* ids = ids_of(row) == nullptr ? nullptr : ids_of(row) + begin;
    const Piece piece{logits.row(row) + begin, ids, logits.allowed_in(row), begin,
                      std::min(size, logits.columns - begin)};
    const float lowest = -std::numeric_limits<float>::max();  // excludes -inf
    const float least = how.least == nullptr ? lowest : std::max(lowest, how.least[row]);
    const float temperature = how.temperatures[row];
    best[item] = temperature == 0.0f
                     ? choose_greedily(piece, least)
                     : choose_at_random(piece, temperature, least, row_key(how.seeds[row], how.positions[row]));
  });
  for (int row = 0; row < logits.rows; ++row) {
    Choice choice;
    for (int p = 0; p < pieces; ++p) choice.offer(best[row * pieces + p].score, best[row * pieces + p].token_id);
    const bool found = choice.token_id != std::numeric_limits<int32_t>::max();
    out[row] = found ? choice.token_id : lowest_id(ids_of(row), logits.columns);
  }
}

}  // namespace evospec

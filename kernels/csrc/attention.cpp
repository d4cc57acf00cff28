#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_segment.h"

namespace evospec {

namespace {

// What more keys give, in the units of both.
void add(const Attended& more, int rows, int dim, const Attended& out) {
  for (int r = 0; r < rows; ++r) {
    const float largest = std::max(out.largest[r], more.largest[r]);
    if (more.largest[r] == -std::numeric_limits<float>::infinity()) continue;
    const float keep = std::exp2(out.largest[r] - largest), gain = std::exp2(more.largest[r] - largest);
    float* const sums = out.sums + r * dim;
    for (int d = 0; d < dim; d += kLanes) {
      store(sums + d, multiply_add(load(more.sums + r * dim + d), all(gain), load(sums + d) * all(keep)));
    }
    out.total[r] = out.total[r] * keep + more.total[r] * gain;
    out.largest[r] = largest;
  }
}

void write_rows(const Attended& attended, const Rows& rows, int dim) {
  for (int r = 0; r < rows.count; ++r) {
    const Floats factor = all(1.0f / (attended.total[r] + std::exp2(rows.sink[r] - attended.largest[r])));
    for (int d = 0; d < dim; d += kLanes) store_bf16(rows.out[r] + d, load(attended.sums + r * dim + d) * factor);
  }
}

// All keys of some rows, segment after segment.
void attend(const KvCache& cache, const int32_t* blocks, int head, const Rows& rows) {
  const int dim = cache.head_dim;
  thread_local std::vector<float> memory;
  memory.resize(2 * Attended::size(dim));
  const Attended all_keys(memory.data(), dim), segment(memory.data() + Attended::size(dim), dim);
  int start = rows.first_segment() * kSegment;
  attend_segment(cache, blocks, head, rows, start, all_keys);
  while ((start += kSegment) < rows.context()) {
    attend_segment(cache, blocks, head, rows, start, segment);
    add(segment, rows.count, dim, all_keys);
  }
  write_rows(all_keys, rows, dim);
}

// A weight of zero does not hide what is no number, and a freed block keeps its values until its next owner, perhaps
// another tenant's sequence, has filled it. Keys may be anything: the scores of places that are not seen are not used.
bf16 number_or_zero(bf16 x) { return (x & 0x7F80) == 0x7F80 ? bf16{0} : x; }

}  // namespace

void write_kv(const KvCache& cache, int slot, const float* key, const float* value) {
  const int block = slot / cache.block_size, offset = slot % cache.block_size, dim = cache.head_dim;
  for (int head = 0; head < cache.kv_heads; ++head, key += dim, value += dim) {
    bf16* keys = cache.key_head(block, head) + 2 * offset;
    for (int d = 0; d < dim; d += 2, keys += 2 * cache.block_size) {
      keys[0] = to_bf16(key[d]);
      keys[1] = to_bf16(key[d + 1]);
    }
    bf16* values = cache.value_head(block, head) + static_cast<size_t>(offset / 2) * 2 * dim + offset % 2;
    for (int d = 0; d < dim; ++d) values[2 * d] = number_or_zero(to_bf16(value[d]));
  }
}

namespace {

// The work of one attention, in pieces: sequence, then KV head, then slice of its rows, so that slices that read the same
// keys are computed at about the same time.
class Pieces {
 public:
  struct Piece {
    const int32_t* blocks;
    int head;
    Rows rows;
  };

  Pieces(const Batch& batch, const KvCache& cache, int heads, int window, const float* sinks, const bf16* q, bf16* out)
      : batch_(batch), cache_(cache), heads_(heads), window_(window), sinks_(sinks), q_(q), out_(out) {
    first_.reserve(batch.num_sequences + 1);
    first_.push_back(0);
    for (int b = 0; b < batch.num_sequences; ++b) {
      first_.push_back(first_.back() + slices(b) * cache.kv_heads);
    }
  }

  int count() const { return first_.back(); }

  Piece operator[](int i) const {
    const int b = static_cast<int>(std::upper_bound(first_.begin(), first_.end(), i) - first_.begin()) - 1;
    const int head = (i - first_[b]) / slices(b), begin = (i - first_[b]) % slices(b) * slice_rows_;
    Rows rows;
    rows.count = std::min(slice_rows_, query_len(b) * group() - begin);
    for (int r = 0; r < rows.count; ++r) {
      const int query = (begin + r) / group(), h = head * group() + (begin + r) % group();
      const size_t at = (static_cast<size_t>(batch_.query_start[b] + query) * heads_ + h) * cache_.head_dim;
      rows.q[r] = q_ + at;
      rows.out[r] = out_ + at;
      rows.limit[r] = batch_.seq_lens[b] - query_len(b) + query + 1;
      rows.first[r] = window_ == 0 ? 0 : std::max(rows.limit[r] - window_, 0);
      rows.sink[r] = sinks_ == nullptr ? -std::numeric_limits<float>::infinity() : score_scale(sinks_[h]);
    }
    return {batch_.block_tables + static_cast<size_t>(b) * batch_.max_blocks, head, rows};
  }

 private:
  int group() const { return heads_ / cache_.kv_heads; }
  int query_len(int b) const { return batch_.query_start[b + 1] - batch_.query_start[b]; }
  int slices(int b) const { return (query_len(b) * group() + slice_rows_ - 1) / slice_rows_; }

  const int slice_rows_ = has_amx() ? kMaxRows : kVectorRows;
  const Batch& batch_;
  const KvCache& cache_;
  const int heads_, window_;
  const float* const sinks_;
  const bf16* const q_;
  bf16* const out_;
  std::vector<int> first_;  // the first piece of each sequence, and how many there are
};

int most_segments(const Batch& batch) {
  return (*std::max_element(batch.seq_lens, batch.seq_lens + batch.num_sequences) + kSegment - 1) / kSegment;
}

// Whether threads share the keys of a piece: where there are too few pieces to give all of them something to do, and
// enough segments to be worth another barrier.
bool shares_keys(const Team& team, int pieces, int segments) { return pieces < 2 * team.size() && segments >= 3; }

}  // namespace

size_t attention_parts(const Team& team, const Batch& batch, int head_dim) {
  return 2 * team.size() * most_segments(batch) * Attended::size(head_dim);
}

void attention(Team& team, const Batch& batch, const KvCache& cache, int heads, int window, const float* sinks,
               const bf16* q, bf16* out, float* parts) {
  const Pieces pieces(batch, cache, heads, window, sinks, q, out);
  if constexpr (kMayHaveAmx) {
    if (has_amx()) configure_attention_tiles();
  }
  const int segments = most_segments(batch), dim = cache.head_dim;
  if (!shares_keys(team, pieces.count(), segments)) {
    team.work(pieces.count(), [&](int i) {
      const Pieces::Piece piece = pieces[i];
      attend(cache, piece.blocks, piece.head, piece.rows);
    });
    return release_tiles();
  }
  auto part = [&](int i, int segment) {
    return Attended(parts + (static_cast<size_t>(i) * segments + segment) * Attended::size(dim), dim);
  };
  team.work(pieces.count() * segments, [&](int item) {
    const int i = item / segments, segment = item % segments;
    const auto [blocks, head, rows] = pieces[i];
    if (segment < rows.first_segment() || segment * kSegment >= rows.context()) return;
    attend_segment(cache, blocks, head, rows, segment * kSegment, part(i, segment));
  });
  release_tiles();
  team.barrier();
  team.work(pieces.count(), [&](int i) {
    const Rows rows = pieces[i].rows;
    const Attended all_keys = part(i, rows.first_segment());
    for (int segment = rows.first_segment() + 1; segment * kSegment < rows.context(); ++segment) {
      add(part(i, segment), rows.count, dim, all_keys);
    }
    write_rows(all_keys, rows, dim);
  });
}

}  // namespace evospec

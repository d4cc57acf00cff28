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

// Contexts of fewer segments are not worth another barrier.
constexpr int kSegmentsWorthParts = 3;

// So few pieces of work leave threads with nothing to do.
bool leaves_threads(const Team& team, int items) { return items < 2 * team.size(); }

int most_segments(const Batch& batch) {
  return (*std::max_element(batch.seq_lens, batch.seq_lens + batch.num_sequences) + kSegment - 1) / kSegment;
}

}  // namespace

size_t attention_parts(const Team& team, const Batch& batch, int head_dim) {
  return 2 * team.size() * most_segments(batch) * Attended::size(head_dim);
}

void attention(Team& team, const Batch& batch, const KvCache& cache, int heads, int window, const float* sinks,
               const bf16* q, bf16* out, float* parts) {
  const int group = heads / cache.kv_heads, dim = cache.head_dim;
  // Work items are laid out as: sequence, then slice of its rows, then KV head.
  auto by_tiles = [&](int b) { return has_amx() && !batch.decodes(b); };
  auto slice_rows = [&](int b) { return by_tiles(b) ? kMaxRows : kVectorRows; };
  auto slices = [&](int b) {
    const int rows = (batch.query_start[b + 1] - batch.query_start[b]) * group;
    return (rows + slice_rows(b) - 1) / slice_rows(b);
  };
  thread_local std::vector<int> first;  // first work item of each sequence
  first.assign(1, 0);
  for (int b = 0; b < batch.num_sequences; ++b) first.push_back(first.back() + slices(b) * cache.kv_heads);

  // do_item(blocks, head, rows) of an item
  auto with = [&](int item, auto do_item) {
    const int b = static_cast<int>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
    const int head = (item - first[b]) % cache.kv_heads;
    const int begin = (item - first[b]) / cache.kv_heads * slice_rows(b);
    const int query_len = batch.query_start[b + 1] - batch.query_start[b];
    Rows rows;
    rows.by_tiles = by_tiles(b);
    rows.count = std::min(slice_rows(b), query_len * group - begin);
    for (int r = 0; r < rows.count; ++r) {
      const int query = (begin + r) / group, h = head * group + (begin + r) % group;
      const size_t at = (static_cast<size_t>(batch.query_start[b] + query) * heads + h) * dim;
      rows.q[r] = q + at;
      rows.out[r] = out + at;
      rows.limit[r] = batch.seq_lens[b] - query_len + query + 1;
      rows.first[r] = window == 0 ? 0 : std::max(rows.limit[r] - window, 0);
      rows.sink[r] = sinks == nullptr ? -std::numeric_limits<float>::infinity() : score_scale(sinks[h]);
    }
    do_item(batch.block_tables + static_cast<size_t>(b) * batch.max_blocks, head, rows);
  };

  if constexpr (kMayHaveAmx) {
    if (has_amx()) configure_attention_tiles();
  }
  const int items = first.back(), segments = most_segments(batch);
  if (segments < kSegmentsWorthParts || !leaves_threads(team, items)) {
    team.work(items, [&](int item) {
      with(item, [&](const int32_t* blocks, int head, const Rows& rows) { attend(cache, blocks, head, rows); });
    });
    return release_tiles();
  }
  auto part = [&](int item, int segment) {
    return Attended(parts + (static_cast<size_t>(item) * segments + segment) * Attended::size(dim), dim);
  };
  team.work(items * segments, [&](int i) {
    with(i / segments, [&](const int32_t* blocks, int head, const Rows& rows) {
      const int start = i % segments * kSegment;
      if (start < rows.first_segment() * kSegment || start >= rows.context()) return;
      attend_segment(cache, blocks, head, rows, start, part(i / segments, i % segments));
    });
  });
  release_tiles();
  team.barrier();
  team.work(items, [&](int item) {
    with(item, [&](const int32_t*, int, const Rows& rows) {
      const Attended all_keys = part(item, rows.first_segment());
      for (int s = rows.first_segment() + 1; s * kSegment < rows.context(); ++s) add(part(item, s), rows.count, dim, all_keys);
      write_rows(all_keys, rows, dim);
    });
  });
}

}  // namespace evospec

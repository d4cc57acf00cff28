// Causal attention over a paged bf16 KV cache.
//
// Keys of a block:   [kv_heads][head_dim / 2][block_size][2]   dimension pairs of one token side by side
// Values of a block: [kv_heads][block_size / 2][head_dim][2]   token pairs of one dimension side by side
// so that both products are chains of vdpbf16ps over whole registers, read forward, with nothing gathered.
#pragma once

#include "simd.h"
#include "threads.h"

namespace evospec {

struct KvCache {  // of one layer
  bf16* keys;
  bf16* values;
  int block_size;  // a multiple of 16
  int kv_heads;
  int head_dim;  // a multiple of 32

  size_t head_size() const { return static_cast<size_t>(block_size) * head_dim; }
  bf16* key_head(int block, int head) const { return keys + (static_cast<size_t>(block) * kv_heads + head) * head_size(); }
  bf16* value_head(int block, int head) const {
    return values + (static_cast<size_t>(block) * kv_heads + head) * head_size();
  }
};

// The caches of all layers, one after the other.
struct KvLayers {
  bf16* keys;
  bf16* values;
  int block_size;
  size_t layer_stride;  // elements from one layer's to the next

  KvCache of_layer(int layer, int kv_heads, int head_dim) const {
    return {keys + layer * layer_stride, values + layer * layer_stride, block_size, kv_heads, head_dim};
  }
};

// One step's ragged batch; see engine/batch.py for the fields.
struct Batch {
  int num_tokens;
  int num_sequences;
  int max_blocks;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  const int32_t* slots;
  int num_prefilling;  // the last sequences

  // The first tokens, of sequences that decode: linear.h multiplies them otherwise than those of prompts.
  int num_decoded_tokens() const { return query_start[num_sequences - num_prefilling]; }
};

// Factor of q that makes scores exponents of two, where products of queries and keys are multiplied with `scale`.
inline float score_scale(float scale) { return 1.44269504f * scale; }

// Writes one token's keys and values (float [kv_heads][head_dim]) into its slot.
void write_kv(const KvCache& cache, int slot, const float* key, const float* value);

// q: [tokens][heads][head_dim] bf16, already scaled by score_scale. out: the same shape, bf16.
// window: how many tokens each attends to, itself included; 0: all. sinks: [heads], the score of one more key, whose value
// is zero; null: there is none.
// parts: memory for attention_parts floats. Where there are fewer sequences and heads than threads have use for, they share
// the keys of each.
// Inside Team::run, by all threads; ends without a barrier.
void attention(Team& team, const Batch& batch, const KvCache& cache, int heads, int window, const float* sinks,
               const bf16* q, bf16* out, float* parts);

size_t attention_parts(const Team& team, const Batch& batch, int head_dim);

}  // namespace evospec

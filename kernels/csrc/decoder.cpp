#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "rows.h"

namespace evospec {

namespace {

// What makes a row's root mean square one.
float rms_factor(const float* x, float eps, int size) {
  Floats squares = all(0.0f);
  for (int i = 0; i < size; i += 16) {
    const Floats v = load(x + i);
    squares = multiply_add(v, v, squares);
  }
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
}

void rms_norm(const float* x, const float* weight, float eps, int size, bf16* out) {
  const Floats factor = all(rms_factor(x, eps, size));
  for (int i = 0; i < size; i += 16) store_bf16(out + i, load(x + i) * factor * load(weight + i));
}

// Half-split rotary embedding of the first `dim` values, in place; cos_sin: of the position.
void rotate(const float* cos_sin, int dim, float* x) {
  const int half = dim / 2;
  const float* sin = cos_sin + half;
  for (int d = 0; d < half; d += 16) {
    const Floats a = load(x + d), b = load(x + d + half), c = load(cos_sin + d), s = load(sin + d);
    store(x + d, multiply_subtract(a, c, b * s));
    store(x + d + half, multiply_add(b, c, a * s));
  }
}

}  // namespace

void unpack_rows(Team& team, const Matrix& matrix, const int32_t* rows, int count, float* out) {
  // A few rows are unpacked in less time than it takes to wake the others.
  for_each_item(&team, count, static_cast<size_t>(count) * matrix.k, [&](int i) {
    unpack_row(matrix, rows[i], out + static_cast<size_t>(i) * matrix.k);
  });
}

Decoder::Decoder(Team& team, const DecoderShape& shape) : shape_(shape), team_(team) {}

void Decoder::reserve(const Batch& batch, const LoraRows* lora) {
  const int tokens = batch.num_tokens;
  // Whole tiles are read, wherever they begin.
  const size_t rows = static_cast<size_t>(tokens + 31) / 32 * 32 + 16;
  const size_t heads = static_cast<size_t>(shape_.heads) * shape_.head_dim;
  const size_t qkv = heads + 2 * static_cast<size_t>(shape_.kv_heads) * shape_.head_dim;
  auto grow = [](auto& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  grow(normed_, rows * 2 * shape_.hidden);  // a draft layer's input is twice as wide
  grow(added_, rows * shape_.hidden);
  grow(q_, rows * heads);
  grow(attended_, rows * heads);
  grow(qkv_, rows * qkv);
  grow(gated_, rows * shape_.intermediate);
  grow(room_, rows * std::max({2 * shape_.hidden, static_cast<int>(heads), shape_.intermediate}) / 16);
  grow(attention_parts_, attention_parts(team_, batch, shape_.head_dim));
  if (lora != nullptr) grow(lora_sums_, static_cast<size_t>(tokens) * lora->rank);
  for (const Layer& layer : layers_) {
    if (layer.experts.router != nullptr) mixture_.reserve(layer.experts, tokens, shape_.hidden, shape_.intermediate);
  }
}

void Decoder::embed(const Matrix& embedding, const int32_t* token_ids, int count, float* residual) {
  unpack_rows(team_, embedding, token_ids, count, residual);
  if (shape_.embedding_scale == 1.0f) return;
  const size_t size = static_cast<size_t>(count) * shape_.hidden;
  for (size_t i = 0; i < size; i += 16) store(residual + i, load(residual + i) * all(shape_.embedding_scale));
}

// Rows of `hidden` values in, rows `stride` apart out.
void Decoder::normalize(const float* weight, const float* rows, int count, bf16* out, int stride) {
  team_.work(count, [&](int i) {
    const float* row = rows + static_cast<size_t>(i) * shape_.hidden;
    rms_norm(row, weight, shape_.norm_eps, shape_.hidden, out + static_cast<size_t>(i) * stride);
  });
}

void Decoder::normalize_input(const Layer& layer, const float* embeddings, float* residual, int tokens) {
  const int hidden = shape_.hidden;
  if (layer.embedding_norm == nullptr) {
    normalize(layer.input_norm, residual, tokens, normed_.data(), hidden);
  } else {
    normalize(layer.embedding_norm, embeddings, tokens, normed_.data(), 2 * hidden);
    team_.barrier();  // the next phase of work
    normalize(layer.input_norm, residual, tokens, normed_.data() + hidden, 2 * hidden);
  }
  if (layer.norms_residual == 0) return;
  team_.barrier();
  team_.work(tokens, [&](int token) {
    float* row = residual + static_cast<size_t>(token) * hidden;
    const Floats factor = all(rms_factor(row, shape_.norm_eps, hidden));
    for (int i = 0; i < hidden; i += 16) store(row + i, load(row + i) * factor * load(layer.input_norm + i));
  });
}

// One head of queries or keys, in place: its norm, if there is one, then its rotary embedding.
void Decoder::prepare_head(const Layer& layer, const float* norm, int position, float* head) const {
  const int dim = shape_.head_dim;
  if (norm != nullptr) {
    const Floats factor = all(rms_factor(head, shape_.norm_eps, dim));
    for (int d = 0; d < dim; d += 16) store(head + d, load(head + d) * factor * load(norm + d));
  }
  if (layer.cos_sin == nullptr) return;
  rotate(layer.cos_sin + static_cast<size_t>(position) * layer.rotary_dim, layer.rotary_dim, head);
}

// row: of the queries, where the token's go; -1: nowhere.
void Decoder::prepare_and_write(const Batch& batch, const KvCache& kv, const Layer& layer, int token, int row) {
  const int dim = shape_.head_dim, q_size = shape_.heads * dim, kv_size = shape_.kv_heads * dim;
  float* q = qkv_.data() + static_cast<size_t>(token) * (q_size + 2 * kv_size);
  float* k = q + q_size;
  const int position = batch.positions[token];
  // Scores are taken to base 2, and scaled here once rather than once a key.
  const Floats scale = all(score_scale(shape_.attention_scale));
  for (int h = 0; h < shape_.heads && row >= 0; ++h) {
    prepare_head(layer, layer.q_norm, position, q + h * dim);
    bf16* out = q_.data() + static_cast<size_t>(row) * q_size + h * dim;
    for (int d = 0; d < dim; d += 16) store_bf16(out + d, load(q + h * dim + d) * scale);
  }
  for (int h = 0; h < shape_.kv_heads; ++h) prepare_head(layer, layer.k_norm, position, k + h * dim);
  write_kv(kv, batch.slots[token], k, k + kv_size);
}

// The residual stream gains x W^T, after its norm, if there is one.
void Decoder::add_product(const Matrix& weight, const bf16* x, int tokens, int num_direct, const float* norm,
                          const Matrix* next, float* residual) {
  const int hidden = shape_.hidden;
  if (norm == nullptr) {
    linear(team_, {&weight, x, tokens, Epilogue::kAdd, residual, hidden, num_direct, next, room_.data()});
    return team_.barrier();
  }
  linear(team_, {&weight, x, tokens, Epilogue::kStore, added_.data(), hidden, num_direct, next, room_.data()});
  team_.barrier();
  team_.work(tokens, [&](int token) {
    const float* added = added_.data() + static_cast<size_t>(token) * hidden;
    float* out = residual + static_cast<size_t>(token) * hidden;
    const Floats factor = all(rms_factor(added, shape_.norm_eps, hidden));
    for (int i = 0; i < hidden; i += 16) store(out + i, load(out + i) + load(added + i) * factor * load(norm + i));
  });
  team_.barrier();
}

Decoder::Kept::Kept(const Batch& all, const LoraRows* all_lora, const WantedRows& wanted)
    : wanted(wanted), row_of(all.num_tokens, -1), query_start(1, 0), batch(all) {
  for (int row = 0; row < wanted.count; ++row) row_of[wanted.rows[row]] = row;
  for (int b = 0; b < all.num_sequences; ++b) {
    const auto begin = row_of.begin() + all.query_start[b], end = row_of.begin() + all.query_start[b + 1];
    query_start.push_back(query_start.back() +
                          static_cast<int>(std::count_if(begin, end, [](int row) { return row >= 0; })));
  }
  batch.num_tokens = wanted.count;
  batch.query_start = query_start.data();
  if (all_lora == nullptr) return;
  lora = *all_lora;
  for (int row = 0; row < wanted.count; ++row) slots.push_back(all_lora->slots[wanted.rows[row]]);
  lora.slots = slots.data();
}

// The wanted rows of the residual stream move to its front: in their order, since a row's place may be another's source.
void Decoder::keep(const WantedRows& wanted, float* residual) const {
  const size_t hidden = shape_.hidden;
  for (int row = 0; row < wanted.count; ++row) {
    std::copy_n(residual + wanted.rows[row] * hidden, hidden, residual + row * hidden);
  }
}

void Decoder::attend(const Batch& batch, const KvCache& kv, const Layer& layer, const LoraRows* lora, const Kept* kept,
                     float* residual) {
  const int tokens = batch.num_tokens, num_direct = batch.num_decoded_tokens();
  const int columns = (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim;
  float* out = qkv_.data();
  for (const Matrix& part : std::span(layer.qkv, layer.num_qkv)) {
    const Matrix* const next = &part == &layer.qkv[layer.num_qkv - 1] ? &layer.output : &part + 1;
    linear(team_, {&part, normed_.data(), tokens, Epilogue::kStore, out, columns, num_direct, next, room_.data()});
    team_.barrier();
    out += part.n;
  }
  if (lora != nullptr) add_lora(team_, *lora, lora->qkv, normed_.data(), tokens, lora_sums_.data(), columns, qkv_.data());
  team_.work(kept == nullptr ? tokens : tokens + 1, [&](int token) {
    if (token == tokens) return keep(kept->wanted, residual);  // nobody reads the stream meanwhile
    prepare_and_write(batch, kv, layer, token, kept == nullptr ? token : kept->row_of[token]);
  });
  team_.barrier();
  const Batch& rows = kept == nullptr ? batch : kept->batch;
  attention(team_, rows, kv, shape_.heads, layer.window, layer.sinks, q_.data(), attended_.data(),
            attention_parts_.data());
  team_.barrier();
}

void Decoder::run_layer(const Batch& batch, const KvCache& kv, const Layer& layer, const float* embeddings,
                        const LoraRows* lora, const Kept* kept, const Matrix* next, float* residual) {
  normalize_input(layer, embeddings, residual, batch.num_tokens);
  team_.barrier();
  attend(batch, kv, layer, lora, kept, residual);
  const Batch& rows = kept == nullptr ? batch : kept->batch;
  const int tokens = rows.num_tokens, num_direct = rows.num_decoded_tokens(), hidden = shape_.hidden;
  if (tokens == 0) return;
  if (lora != nullptr && kept != nullptr) lora = &kept->lora;
  const Matrix* const after_attention = layer.experts.router == nullptr ? &layer.gate_up : nullptr;
  add_product(layer.output, attended_.data(), tokens, num_direct, layer.attention_norm, after_attention, residual);
  if (lora != nullptr) add_lora(team_, *lora, lora->output, attended_.data(), tokens, lora_sums_.data(), hidden, residual);

  normalize(layer.mlp_norm, residual, tokens, normed_.data(), hidden);
  team_.barrier();
  if (layer.experts.router != nullptr) {
    const int intermediate = shape_.intermediate;
    return mixture_.add(team_, layer.experts, shape_.gate, normed_.data(), tokens, hidden, intermediate, residual);
  }
  linear(team_, {&layer.gate_up, normed_.data(), tokens, shape_.gate, gated_.data(), shape_.intermediate, num_direct,
                 &layer.down, room_.data()});
  team_.barrier();
  add_product(layer.down, gated_.data(), tokens, num_direct, layer.output_norm, next, residual);
  if (lora != nullptr) add_lora(team_, *lora, lora->down, gated_.data(), tokens, lora_sums_.data(), hidden, residual);
}

void Decoder::forward(const Batch& batch, const KvLayers& kv, const float* embeddings, const LoraRows* lora,
                      const WantedRows* wanted, float* residual, const PassOutputs& outputs) {
  const int tokens = batch.num_tokens, hidden = shape_.hidden, num_layers = static_cast<int>(layers_.size());
  reserve(batch, lora);
  std::optional<Kept> kept;
  if (wanted != nullptr) kept.emplace(batch, lora, *wanted);
  team_.run([&](int) {
    int next = 0;  // of outputs.captured
    for (int l = 0; l < num_layers; ++l) {
      const KvCache cache = kv.of_layer(l, shape_.kv_heads, shape_.head_dim);
      const Matrix* const after = l + 1 < num_layers ? layers_[l + 1].qkv : nullptr;
      run_layer(batch, cache, layers_[l], embeddings, lora, kept ? &*kept : nullptr, after, residual);
      if (next == outputs.num_captured || outputs.captured[next] != l) continue;
      team_.work(tokens, [&](int token) {
        const float* row = residual + static_cast<size_t>(token) * hidden;
        bf16* out = outputs.features + (static_cast<size_t>(token) * outputs.num_captured + next) * hidden;
        for (int i = 0; i < hidden; i += 16) store_bf16(out + i, load(row + i));
      });
      team_.barrier();
      ++next;
    }
    const int num_wanted = wanted == nullptr ? tokens : wanted->count;
    if (outputs.hidden != nullptr) normalize(outputs.norm_weight, residual, num_wanted, outputs.hidden, hidden);
  });
}

void Decoder::final_norm(const float* weight, const float* residual, int count, bf16* out) {
  team_.run([&](int) { normalize(weight, residual, count, out, shape_.hidden); });
}

// out [rows][parts][size] = RMS norm of each part of a row of features, whose weight is [parts][size].
extern "C" void evo_norm_features(Team& team, const bf16* features, const float* weight, int rows, int parts, int size,
                                  float eps, bf16* out) {
  for_each_item(&team, rows, static_cast<size_t>(rows) * parts * size, [&](int row) {
    std::vector<float> part(size);
    for (int p = 0; p < parts; ++p) {
      const size_t at = (static_cast<size_t>(row) * parts + p) * size;
      for (int i = 0; i < size; i += 16) store(part.data() + i, load_bf16(features + at + i));
      rms_norm(part.data(), weight + static_cast<size_t>(p) * size, eps, size, out + at);
    }
  });
}

}  // namespace evospec

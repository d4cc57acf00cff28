// The C interface that kernels/native.py calls through ctypes. Plain pointers and ints; the caller keeps every
// buffer alive and checks shapes.

#include <vector>

#include "decoder.h"
#include "direct.h"
#include "draft_chain.h"
#include "gguf_rows.h"
#include "tiles.h"

using namespace evospec;

extern "C" {

// Hash of the sources that this library was made of (kernels/targets.py).

struct EvoMatrix {
  int format, n, k, digits;
  const uint8_t* data;
  const float* bias;
};

struct EvoLayer {
  EvoMatrix qkv[3];
  int num_qkv;
  EvoMatrix output, gate_up, down;
  const float* input_norm;
  const float* post_norm;
  const float* embedding_norm;
};

struct EvoKv {
  bf16* keys;
  bf16* values;
  int block_size;
  size_t layer_stride;  // elements between one layer's cache and the next
};

struct EvoChainModel {
  Decoder* layer;
  const float* norm;
  int hidden;
  EvoMatrix embedding, head, core;
  const int32_t* core_ids;
  const TailSlabs* tails;
  const Sessions* sessions;
  const TextIndexes* texts;
  const EvoKv* kv;
};

// Once, before anything else.
void evo_find_processor() { find_processor(); }

int evo_packed_format(int ggml_type) { return packed_format(ggml_type); }
size_t evo_block_bytes(int format) { return block_bytes(format); }

// Packs weight rows row_map[i] <- source row i (GGUF blocks) into `data`, which starts as zeros.
void evo_pack_ggml(uint8_t* data, int ggml_type, const uint8_t* rows, const int32_t* row_map, int count, int k) {
  std::vector<uint8_t> codes(k);
  std::vector<float> scales(k / 16), minima(k / 32);
  RowCodes out{0, codes.data(), scales.data(), minima.data()};
  for (int i = 0; i < count; ++i) {
    decode_row(ggml_type, rows + i * ggml_row_bytes(ggml_type, k), k, out);
    pack_codes(data, k, row_map[i], out);
  }
}

// The same from floats, to bf16.
void evo_pack_floats(uint8_t* data, const float* rows, const int32_t* row_map, int count, int k) {
  for (int i = 0; i < count; ++i) pack_floats(data, k, row_map[i], rows + static_cast<size_t>(i) * k);
}

static Matrix to_matrix(const EvoMatrix& m) {
  Matrix out;
  out.format = m.format;
  out.n = m.n;
  out.k = m.k;
  out.digits = takes_one_digit(m.format) ? m.digits : 2;
  out.data = m.data;
  out.bias = m.bias;
  return out;
}

Team* evo_team_new(int num_threads) { return new Team(num_threads); }
void evo_team_free(Team* team) { delete team; }

int evo_has_fast_bf16() { return has_fast_bf16(); }

int evo_max_direct_rows() { return max_direct_rows(); }

int evo_fastest_digits() { return fastest_digits(); }

// out [rows][n] = x W^T + bias; x is bf16 [rows rounded up to a multiple of 16][k].
void evo_linear(Team* team, const EvoMatrix* weight, const bf16* x, int rows, float* out) {
  const Matrix matrix = to_matrix(*weight);
  team->run([&](int) { linear(*team, {&matrix, x, rows, Epilogue::kStore, out, matrix.n}); });
}

// The same in bf16, row r to row rows_out[r] of out [any][n].
void evo_linear_to_rows(Team* team, const EvoMatrix* weight, const bf16* x, int rows, const int32_t* rows_out,
                        bf16* out) {
  const Matrix matrix = to_matrix(*weight);
  std::vector<float> y(static_cast<size_t>(rows) * matrix.n);
  team->run([&](int) {
    linear(*team, {&matrix, x, rows, Epilogue::kStore, y.data(), matrix.n});
    team->barrier();
    team->work(rows, [&](int row) {
      const float* from = y.data() + static_cast<size_t>(row) * matrix.n;
      bf16* to = out + static_cast<size_t>(rows_out[row]) * matrix.n;
      for (int i = 0; i < matrix.n; ++i) to[i] = to_bf16(from[i]);
    });
  });
}

// out [rows][stride] gains what the rows' adapters of q, k and v make of x [rows][inputs].
void evo_lora(Team* team, const LoraRows* lora, const bf16* x, int rows, int stride, float* out) {
  team->run([&](int) {
    team->work(rows, [&](int row) {
      const LoraMatrix& qkv = lora->qkv;
      add_lora(*lora, qkv, row, x + static_cast<size_t>(row) * qkv.inputs, out + static_cast<size_t>(row) * stride);
    });
  });
}

// One layer's attention on its own: q [tokens][heads][dim], k and v [tokens][kv_heads][dim], out like q.
void evo_attention(Team* team, const Batch* batch, const EvoKv* kv, int layer, int heads, int kv_heads, int head_dim,
                   const float* q, const float* k, const float* v, float* out) {
  const size_t offset = layer * kv->layer_stride, q_size = static_cast<size_t>(heads) * head_dim;
  const size_t kv_size = static_cast<size_t>(kv_heads) * head_dim;
  const KvCache cache{kv->keys + offset, kv->values + offset, kv->block_size, kv_heads, head_dim};
  std::vector<bf16> scaled(batch->num_tokens * q_size), attended(batch->num_tokens * q_size);
  const float scale = score_scale(head_dim);
  team->run([&](int) {
    team->work(batch->num_tokens, [&](int t) {
      write_kv(cache, batch->slots[t], k + t * kv_size, v + t * kv_size);
      for (size_t i = t * q_size; i < (t + 1) * q_size; ++i) scaled[i] = to_bf16(q[i] * scale);
    });
    team->barrier();
    attention(*team, *batch, cache, heads, scaled.data(), attended.data());
  });
  for (size_t i = 0; i < attended.size(); ++i) out[i] = to_float(attended[i]);
}

Decoder* evo_decoder_new(Team* team, const DecoderShape* shape, const float* cos_sin) {
  return new Decoder(*team, *shape, cos_sin);
}

void evo_decoder_free(Decoder* decoder) { delete decoder; }

void evo_decoder_add_layer(Decoder* decoder, const EvoLayer* layer) {
  std::vector<Matrix> qkv;
  for (int i = 0; i < layer->num_qkv; ++i) qkv.push_back(to_matrix(layer->qkv[i]));
  decoder->add_layer({qkv, to_matrix(layer->output), to_matrix(layer->gate_up), to_matrix(layer->down),
                      layer->input_norm, layer->post_norm, layer->embedding_norm});
}

void evo_decoder_embed(Decoder* decoder, const EvoMatrix* table, const int32_t* ids, int count, float* residual) {
  decoder->embed(to_matrix(*table), ids, count, residual);
}

void evo_decoder_forward(Decoder* decoder, const Batch* batch, const EvoKv* kv, const float* embeddings,
                         const LoraRows* lora, const WantedRows* wanted, float* residual, const PassOutputs* outputs) {
  decoder->forward(*batch, kv->keys, kv->values, kv->block_size, kv->layer_stride, embeddings, lora, wanted, residual,
                   *outputs);
}

void evo_decoder_final_norm(Decoder* decoder, const float* weight, const float* residual, int count, bf16* out) {
  decoder->final_norm(weight, residual, count, out);
}

int evo_draft_chain(Team* team, const EvoChainModel* model, const ChainRows* rows, float* a,
                    const ChainOutputs* out) {
  const EvoKv& kv = *model->kv;
  const ChainModel chain{model->layer,    model->norm,  model->hidden, to_matrix(model->embedding),
                         to_matrix(model->head), to_matrix(model->core), model->core_ids, model->tails,
                         model->sessions, model->texts, kv.keys, kv.values, kv.block_size};
  return draft_chain(*team, chain, *rows, a, *out);
}

}  // extern "C"

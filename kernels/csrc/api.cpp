// The C interface that kernels/*.py call through ctypes, as far as it is not extern "C" where it is computed. Plain pointers
// and ints: the caller keeps every buffer alive, checks shapes, and fills structures as the headers have them.

#include <vector>

#include "decoder.h"
#include "tiles.h"

using namespace evospec;

extern "C" {

size_t evo_block_bytes(int format) { return block_bytes(format); }

Team* evo_team_new(int num_threads) { return new Team(num_threads); }
void evo_team_free(Team* team) { delete team; }

int evo_has_fast_bf16() { return has_fast_bf16(); }
int evo_has_amx() { return has_amx(); }

// out [rows][n] = x W^T + bias; x is bf16 [rows rounded up to a multiple of 16][k].
void evo_linear(Team& team, const Matrix& weight, const bf16* x, int rows, float* out) {
  team.run([&](int) { linear(team, {&weight, x, rows, Epilogue::kStore, out, weight.n, rows}); });
}

// The same in bf16, row r to row rows_out[r] of out [any][n].
void evo_linear_to_rows(Team& team, const Matrix& weight, const bf16* x, int rows, const int32_t* rows_out, bf16* out) {
  std::vector<float> y(static_cast<size_t>(rows) * weight.n);
  team.run([&](int) {
    linear(team, {&weight, x, rows, Epilogue::kStore, y.data(), weight.n, rows});
    team.barrier();
    team.work(rows, [&](int row) {
      const float* from = y.data() + static_cast<size_t>(row) * weight.n;
      bf16* to = out + static_cast<size_t>(rows_out[row]) * weight.n;
      for (int i = 0; i < weight.n; ++i) to[i] = to_bf16(from[i]);
    });
  });
}

// out [rows][stride] gains what the rows' adapters of q, k and v make of x [rows][inputs].
void evo_lora(Team& team, const LoraRows& lora, const bf16* x, int rows, int stride, float* out) {
  std::vector<float> sums(static_cast<size_t>(rows) * lora.rank);
  team.run([&](int) { add_lora(team, lora, lora.qkv, x, rows, sums.data(), stride, out); });
}

// One layer's attention on its own: q [tokens][heads][dim], k and v [tokens][kv_heads][dim], out like q. softmax_scale:
// of the products of queries and keys; window, sinks: as in attention.h.
void evo_attention(Team& team, const Batch& batch, const KvLayers& kv, int layer, int heads, int kv_heads, int head_dim,
                   float softmax_scale, int window, const float* sinks, const float* q, const float* k, const float* v,
                   float* out) {
  const size_t q_size = static_cast<size_t>(heads) * head_dim, kv_size = static_cast<size_t>(kv_heads) * head_dim;
  const KvCache cache = kv.of_layer(layer, kv_heads, head_dim);
  std::vector<bf16> scaled(batch.num_tokens * q_size), attended(batch.num_tokens * q_size);
  std::vector<float> parts(attention_parts(team, batch, head_dim));
  const float scale = score_scale(softmax_scale);
  team.run([&](int) {
    team.work(batch.num_tokens, [&](int t) {
      write_kv(cache, batch.slots[t], k + t * kv_size, v + t * kv_size);
      for (size_t i = t * q_size; i < (t + 1) * q_size; ++i) scaled[i] = to_bf16(q[i] * scale);
    });
    team.barrier();
    attention(team, batch, cache, heads, window, sinks, scaled.data(), attended.data(), parts.data());
  });
  for (size_t i = 0; i < attended.size(); ++i) out[i] = to_float(attended[i]);
}

// out [count][table.k] = rows of a matrix.
void evo_unpack_rows(Team& team, const Matrix& table, const int32_t* rows, int count, float* out) {
  unpack_rows(team, table, rows, count, out);
}

Decoder* evo_decoder_new(Team& team, const DecoderShape& shape) { return new Decoder(team, shape); }

void evo_decoder_free(Decoder* decoder) { delete decoder; }

void evo_decoder_add_layer(Decoder& decoder, const Layer& layer) { decoder.add_layer(layer); }

void evo_decoder_embed(Decoder& decoder, const Matrix& table, const int32_t* ids, int count, float* residual) {
  decoder.embed(table, ids, count, residual);
}

void evo_decoder_forward(Decoder& decoder, const Batch& batch, const KvLayers& kv, const float* embeddings,
                         const LoraRows* lora, const WantedRows* wanted, float* residual, const PassOutputs& outputs) {
  decoder.forward(batch, kv, embeddings, lora, wanted, residual, outputs);
}

void evo_decoder_final_norm(Decoder& decoder, const float* weight, const float* residual, int count, bf16* out) {
  decoder.final_norm(weight, residual, count, out);
}

}  // extern "C"

// The whole decoder stack for one ragged batch. Families differ by what their layers have: null and zero stand for what a
// Llama has not.
#pragma once

#include <vector>

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "lora.h"

namespace evospec {

struct Layer {
  Matrix qkv[3];  // one for each run of equal storage formats among q, k and v, in that order
  int num_qkv;
  Matrix output;
  Matrix gate_up, down;  // of the MLP; empty where there are experts
  const float* input_norm;
  const float* mlp_norm;
  // Of a draft layer (EAGLE-3): its q, k and v take the token's embedding, normalised by this, beside the normalised
  // residual stream, 2 * hidden wide. Null otherwise.
  const float* embedding_norm;
  const float* q_norm;  // [head_dim], of each head before its rotary embedding
  const float* k_norm;
  const float* attention_norm;  // [hidden], of what attention adds to the residual stream
  const float* output_norm;     // and of what the MLP adds
  const float* sinks;           // [heads], as in attention.h
  // [max_positions][rotary_dim]: rotary_dim / 2 cosines, then as many sines; null: no rotary embedding.
  const float* cos_sin;
  int rotary_dim;  // dimensions of a head that turn, the first ones; a multiple of 32
  int window;      // how many tokens are attended to, the token itself included; 0: all
  int norms_residual;  // of a draft layer: whether its input norm changes the residual stream, too
  Experts experts;
};

struct DecoderShape {
  int hidden, intermediate, heads, kv_heads, head_dim;
  Epilogue gate;  // what the MLP does with gate and up
  float norm_eps;
  float attention_scale;  // of the products of queries and keys
  float embedding_scale;
};

// out [count][matrix.k]: rows of a matrix.
void unpack_rows(Team& team, const Matrix& matrix, const int32_t* rows, int count, float* out);

// What a pass leaves behind besides the residual stream.
struct PassOutputs {
  const float* norm_weight;
  bf16* hidden;            // [wanted][hidden]: RMS norm of the residual stream after the last layer; null: of no use
  const int32_t* captured; // layers whose output is wanted, ascending
  int num_captured;
  bf16* features;          // [tokens][num_captured][hidden]: those outputs
};

// Rows that a draft layer's output is wanted of, the last of each sequence: of the others it only writes keys and values.
struct WantedRows {
  const int32_t* rows;  // ascending
  int count;
};

class Decoder {
 public:
  Decoder(Team& team, const DecoderShape& shape);

  void add_layer(const Layer& layer) { layers_.push_back(layer); }

  // residual [tokens][hidden] = rows of the embedding, scaled.
  void embed(const Matrix& embedding, const int32_t* token_ids, int count, float* residual);

  // Runs all layers on the residual stream, in place. embeddings [tokens][hidden]: for a draft layer, else null.
  // lora: what its matrices' products gain, or null. wanted: of a draft layer, whose result moves to the front of the
  // residual stream; null: of all rows.
  void forward(const Batch& batch, const KvLayers& kv, const float* embeddings, const LoraRows* lora,
               const WantedRows* wanted, float* residual, const PassOutputs& outputs);

  // out [count][hidden] = RMS norm of the residual stream: the model's last operation before its head.
  void final_norm(const float* weight, const float* residual, int count, bf16* out);

 private:
  // The wanted rows of a batch, as a batch that attends without writing.
  struct Kept {
    Kept(const Batch& batch, const LoraRows* lora, const WantedRows& wanted);

    const WantedRows wanted;
    std::vector<int32_t> row_of;  // of each token: its row among the wanted, or -1
    std::vector<int32_t> query_start, slots;
    Batch batch;
    LoraRows lora;
  };

  void reserve(const Batch& batch, const LoraRows* lora);
  void normalize(const float* weight, const float* rows, int count, bf16* out, int stride);
  void normalize_input(const Layer& layer, const float* embeddings, float* residual, int tokens);
  void run_layer(const Batch& batch, const KvCache& kv, const Layer& layer, const float* embeddings,
                 const LoraRows* lora, const Kept* kept, const Matrix* next, float* residual);
  void attend(const Batch& batch, const KvCache& kv, const Layer& layer, const LoraRows* lora, const Kept* kept,
              float* residual);
  void keep(const WantedRows& wanted, float* residual) const;
  void add_product(const Matrix& weight, const bf16* x, int tokens, int num_direct, const float* norm, const Matrix* next,
                   float* residual);
  void prepare_and_write(const Batch& batch, const KvCache& kv, const Layer& layer, int token, int row);
  void prepare_head(const Layer& layer, const float* norm, int position, float* head) const;

  const DecoderShape shape_;
  Team& team_;
  std::vector<Layer> layers_;
  // Activations of a step; rows are padded to whole AMX tiles.
  std::vector<bf16> normed_, q_, attended_, gated_;
  std::vector<float> qkv_, added_, lora_sums_, attention_parts_;
  std::vector<CacheLine> room_;  // of products
  Mixture mixture_;
};

}  // namespace evospec

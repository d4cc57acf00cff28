#include "draft_chain.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gumbel.h"
#include "topk.h"

namespace evospec {

namespace {

class Chain {
 public:
  Chain(Team& team, const ChainModel& model, const ChainRows& rows, const ChainOutputs& out)
      : team_(team), model_(model), rows_(rows), out_(out),
        rounds_(rows.sessions == nullptr ? own_rounds_ : model.sessions->rounds()) {
    const size_t most = rows.rows, padded = (most + 31) / 32 * 32;  // products may read whole tiles
    hidden_.resize(padded * model.hidden);
    logits_.resize(most * model.core.n);
    scores_.resize(most * rows.candidates);
    indices_.resize(most * rows.candidates);
    promises_.assign(most, 1.0f);
    if (model.sessions != nullptr) model.sessions->settle();
  }

  int run(const UnreadTokens& unread) {
    read(unread);
    int count = rows_.rows;
    for (int step = 0;; ++step) {
      std::copy_n(hidden_.data(), size(count), out_.hidden + at(step) * model_.hidden);
      begin_round(step);
      find_candidates(count);
      add_prior(step, count);
      choose(step, count);
      if (rows_.chances != nullptr) judge(step, count);
      while (count > 0 && rows_.lengths[count - 1] <= step + 1) --count;  // the longest are the first
      if (count == 0 || !another_pays(step + 1, count)) return step + 1;
      advance(step, count);
    }
  }

 private:
  size_t size(int count) const { return static_cast<size_t>(count) * model_.hidden; }

  size_t at(int step) const { return static_cast<size_t>(step) * rows_.rows; }

  // Writes the entries of unread tokens; the states after the last of each chain's are the first rows of a.
  void read(const UnreadTokens& unread) {
    const int tokens = unread.tokens, count = rows_.rows;
    a_.resize(size(tokens)), embeddings_.resize(size(tokens));
    for (int token = 0; token < tokens; ++token) {
      const bf16* const g = unread.g + size(unread.before[token]);
      for (int i = 0; i < model_.hidden; i += 16) store(a_.data() + size(token) + i, load_bf16(g + i));
    }
    model_.layer->embed(model_.embedding, unread.token_ids, tokens, embeddings_.data());
    const Batch batch{tokens, unread.sequences, rows_.max_blocks, unread.positions, unread.query_start,
                      unread.seq_lens, rows_.block_tables, unread.slots, 0};
    std::vector<int32_t> last(count);
    for (int row = 0; row < count; ++row) last[row] = unread.query_start[row + 1] - 1;
    const WantedRows wanted{last.data(), count};
    model_.layer->forward(batch, *model_.kv, embeddings_.data(), unread.lora, tokens == count ? nullptr : &wanted,
                          a_.data(), {model_.norm, hidden_.data(), nullptr, 0, nullptr});
    keep_normed(count);
  }

  // Where the draft's state is what its output norm gives.
  void keep_normed(int count) {
    for (size_t i = 0; model_.norm_output != 0 && i < size(count); ++i) a_[i] = to_float(hidden_[i]);
  }

  void begin_round(int step) {
    round_ = rows_.sessions == nullptr ? 0 : step;
    rounds_.begin(round_, rows_.rows, rows_.candidates);
  }

  Candidates candidates_of(int row) { return rounds_.of(round_, row); }

  void find_candidates(int count) {
    const int k = rows_.candidates, columns = model_.core.n;
    team_.run([&](int) {
      linear(team_, {&model_.core, hidden_.data(), count, Epilogue::kStore, logits_.data(), columns, count});
    });
    const LogitRows core{logits_.data(), static_cast<size_t>(columns), count, columns, nullptr};
    const Candidates found = candidates_of(0);
    float* const values = found.logits;
    int32_t* const token_ids = found.tokens;
    if (model_.tails != nullptr) {
      evo_draft_top_k(&team_, core, model_.core_ids, *model_.tails, {hidden_.data(), rows_.slabs}, k, values, token_ids);
      return;
    }
    evo_top_k(&team_, core, k, model_.core_ids, values, indices_.data());
    std::copy_n(indices_.data(), static_cast<size_t>(count) * k, token_ids);
  }

  void add_prior(int step, int count) {
    const size_t k = rows_.candidates;
    std::copy_n(candidates_of(0).logits, count * k, scores_.data());
    for (int row = 0; rows_.sessions != nullptr && row < count; ++row) {
      if (rows_.sessions[row] >= 0) add_prior_to(step, row);
    }
  }

  void add_prior_to(int step, int row) {
    drafts_.resize(step);
    for (int i = 0; i < step; ++i) drafts_[i] = out_.tokens[at(i) + row];
    Sessions& sessions = *model_.sessions;
    const Candidates own = candidates_of(row);
    const Repeats repeats = sessions.repeats(*model_.texts, rows_.texts[row], drafts_.data(), step);
    include(repeats, own, [&](int column) { set_head_logit(row, own.tokens[column], own.logits[column]); });
    float* const scores = scores_.data() + static_cast<size_t>(row) * rows_.candidates;
    sessions.take_row(rows_.sessions[row], step, row);
    sessions.score(rows_.sessions[row], drafts_.data(), step, repeats, own, scores);
  }

  // A token that the head does not have keeps the logit of the candidate that made room for it, which was the weakest.
  void set_head_logit(int row, int32_t token, float& logit) {
    const int32_t of_head = model_.row_of == nullptr ? token : model_.row_of[token];
    if (of_head < 0) return;
    head_row_.resize(model_.hidden);
    unpack_row(model_.head, of_head, head_row_.data());
    const bf16* x = hidden_.data() + static_cast<size_t>(row) * model_.hidden;
    logit = 0.0f;
    for (int i = 0; i < model_.hidden; ++i) logit += head_row_[i] * to_float(x[i]);
  }

  void choose(int step, int count) {
    const int k = rows_.candidates;
    const int32_t* token_ids = candidates_of(0).tokens;
    int32_t* tokens = out_.tokens + at(step);
    if (rows_.temperatures == nullptr) {
      for (int row = 0; row < count; ++row) {
        const float* scores = scores_.data() + static_cast<size_t>(row) * k;
        tokens[row] = token_ids[static_cast<size_t>(row) * k + (std::max_element(scores, scores + k) - scores)];
      }
      return;
    }
    const LogitRows scores{scores_.data(), static_cast<size_t>(k), count, k, nullptr};
    const TruncationRows limits{rows_.temperatures, rows_.top_k, rows_.top_p, rows_.min_p};
    std::vector<int64_t> positions(count), chosen(count);
    for (int row = 0; row < count; ++row) positions[row] = rows_.positions[row] + step + 1;
    const GumbelRows how{rows_.seeds, positions.data(), token_ids, rows_.temperatures, &limits};
    evo_gumbel_argmax(nullptr, scores, how, chosen.data());
    for (int row = 0; row < count; ++row) {  // an empty place is what is left where no score is a number
      tokens[row] = static_cast<int32_t>(chosen[row] >= 0 ? chosen[row] : token_ids[static_cast<size_t>(row) * k]);
    }
  }

  // How sure the draft is of the tokens just chosen, and with it the chance that all of a chain is accepted.
  void judge(int step, int count) {
    for (int row = 0; row < count; ++row) {
      const size_t k = rows_.candidates;
      const float* scores = scores_.data() + row * k;
      const int32_t* token_ids = candidates_of(row).tokens;
      const float temperature = rows_.temperatures == nullptr ? 0.0f : rows_.temperatures[row];
      const float sharpness = temperature > 0.0f ? 1.0f / temperature : 1.0f;
      const float chosen = scores[std::find(token_ids, token_ids + k, out_.tokens[at(step) + row]) - token_ids];
      float all = 0.0f;
      for (size_t i = 0; i < k; ++i) all += std::exp((scores[i] - chosen) * sharpness);
      const float share = kConfidenceLevels / all;  // no number where no score is one
      const int level = share >= 0.0f ? std::min(static_cast<int>(share), kConfidenceLevels - 1) : 0;
      out_.confidence[at(step) + row] = level;
      const int kind = 2 * rows_.tenants[row] + (temperature > 0.0f ? 1 : 0);
      promises_[row] *= rows_.chances[kind * kConfidenceLevels + level];
    }
  }

  // Whether the chains' tokens at a place are worth drafting.
  bool another_pays(int place, int count) const {
    if (rows_.chances == nullptr) return true;
    float gain = 0.0f;
    for (int row = 0; row < count; ++row) {
      const float acceptance = rows_.acceptance[static_cast<size_t>(row) * rows_.max_length + place];
      gain += std::max(promises_[row] * acceptance - rows_.verify_costs[place], 0.0f);
    }
    return gain > rows_.draft_cost;
  }

  // The draft layer over the tokens just chosen.
  void advance(int step, int count) {
    const int block_size = model_.kv->block_size;
    positions_.resize(count), seq_lens_.resize(count), slots_.resize(count), query_start_.resize(count + 1);
    for (int row = 0; row < count; ++row) {
      const int position = rows_.positions[row] + step + 1 - model_.shift;
      const int32_t* blocks = rows_.block_tables + static_cast<size_t>(row) * rows_.max_blocks;
      positions_[row] = position;
      seq_lens_[row] = position + 1;
      slots_[row] = blocks[position / block_size] * block_size + position % block_size;
      query_start_[row + 1] = row + 1;
    }
    const Batch batch{count, count, rows_.max_blocks, positions_.data(), query_start_.data(), seq_lens_.data(),
                      rows_.block_tables, slots_.data(), 0};
    model_.layer->embed(model_.embedding, out_.tokens + at(step), count, embeddings_.data());
    model_.layer->forward(batch, *model_.kv, embeddings_.data(), rows_.lora, nullptr, a_.data(),
                          {model_.norm, hidden_.data(), nullptr, 0, nullptr});
    keep_normed(count);
  }

  Team& team_;
  const ChainModel& model_;
  const ChainRows& rows_;
  const ChainOutputs& out_;
  DraftRounds own_rounds_;  // where nobody learns from them: the first one, again and again
  DraftRounds& rounds_;
  int round_ = 0;
  std::vector<bf16> hidden_;
  std::vector<float> a_, embeddings_, logits_, scores_, head_row_, promises_;
  std::vector<int64_t> indices_;
  std::vector<int32_t> drafts_, positions_, query_start_, seq_lens_, slots_;
};

}  // namespace

// Reads what is unread, and drafts. Returns the number of steps.
extern "C" int evo_draft_chain(Team& team, const ChainModel& model, const UnreadTokens& unread, const ChainRows& rows,
                               const ChainOutputs& out) {
  return Chain(team, model, rows, out).run(unread);
}

}  // namespace evospec

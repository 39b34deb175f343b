// Edits of one row of logits before temperature: biases, masks, penalties, bans. Documented order:
// docs/decoding.md.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "sampling/history.h"
#include "sampling/params.h"

namespace pyengine::sampling {

// Bit id of word id / 32: whether the token may come. Tokens beyond its end may not.
using TokenMask = std::vector<uint32_t>;

TokenMask mask_of(const std::vector<int32_t>& ids);

// Logits of tokens that the mask forbids become -infinity.
void apply_mask(const TokenMask& mask, float* logits, int32_t vocab_size);

// What logit_bias, no_repeat_ngram_size, bad_words and min_tokens do to the next token's logits,
// appended to `out` in order. Penalties may follow before a mask or after it: both give the same.
void list_biases(const SlotParams& params, const TokenHistory& history, int64_t num_new,
                 int32_t vocab_size, std::vector<TokenBias>& out);

// Whether the tokens so far are penalised, as `penalized` says (sampling/definitions.h).
bool has_penalties(const SlotParams& params);

// Whether any edit of the row depends on the tokens so far.
bool needs_history(const SlotParams& params);

// A row of logits that remembers what single logits were before they were edited.
class EditedRow {
 public:
  void start(float* logits, int32_t vocab_size) {
    logits_ = logits;
    vocab_size_ = vocab_size;
    originals_.clear();
  }

  // Every edit of `params` up to the minimum length; `allowed`: mask of allowed_token_ids.
  void apply(const SlotParams& params, const TokenMask& allowed, const TokenHistory& history,
             int64_t num_new);

  // The logit of a token that no mask forbids as it was at start().
  float original(int32_t id) const;

 private:
  void set(int32_t id, float value) {
    originals_.emplace_back(id, logits_[id]);
    logits_[id] = value;
  }
  void penalize(const SlotParams& params, const TokenHistory& history);

  float* logits_ = nullptr;
  int32_t vocab_size_ = 0;
  std::vector<std::pair<int32_t, float>> originals_;
  std::vector<TokenBias> biases_;
};

}  // namespace pyengine::sampling

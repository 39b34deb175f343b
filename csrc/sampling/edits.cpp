#include "sampling/edits.h"

#include <algorithm>

#include "sampling/definitions.h"

namespace pyengine::sampling {

namespace {

bool any_longer_than_one(const SlotParams& params) {
  return std::any_of(params.logit_bias.begin(), params.logit_bias.end(),
                     [](const BiasedSequence& entry) { return entry.ids.size() > 1; }) ||
         std::any_of(params.bad_words.begin(), params.bad_words.end(),
                     [](const std::vector<int32_t>& ids) { return ids.size() > 1; });
}

}  // namespace

bool has_penalties(const SlotParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
         params.frequency_penalty != 0.0f;
}

TokenMask mask_of(const std::vector<int32_t>& ids) {
  TokenMask mask;
  for (int32_t id : ids) {
    const auto word = static_cast<size_t>(id / 32);
    if (word >= mask.size()) mask.resize(word + 1, 0);
    mask[word] |= uint32_t{1} << (id % 32);
  }
  return mask;
}

void apply_mask(const TokenMask& mask, float* logits, int32_t vocab_size) {
  const int32_t words = (vocab_size + 31) / 32;
  for (int32_t w = 0; w < words; ++w) {
    const uint32_t bits = static_cast<size_t>(w) < mask.size() ? mask[w] : 0;
    if (bits == ~uint32_t{0}) continue;
    float* x = logits + int64_t{w} * 32;
    const int32_t n = std::min(32, vocab_size - w * 32);
    if (bits == 0) {
      std::fill_n(x, n, kForbidden);
      continue;
    }
    for (int32_t i = 0; i < n; ++i) x[i] = (bits >> i & 1) != 0 ? x[i] : kForbidden;
  }
}

bool needs_history(const SlotParams& params) {
  return has_penalties(params) || params.no_repeat_ngram_size > 0 || params.has_processor ||
         any_longer_than_one(params);
}

void list_biases(const SlotParams& params, const TokenHistory& history, int64_t num_new,
                 int32_t vocab_size, std::vector<TokenBias>& out) {
  // Ids outside the vocabulary are refused before a slot is set; a tokenizer may know more than the
  // model, and what the model cannot say needs no ban.
  auto add_completion = [&](const std::vector<int32_t>& ids, float bias) {
    if (ids.back() < vocab_size &&
        history.ends_in(ids.data(), static_cast<int64_t>(ids.size()) - 1)) {
      out.push_back({ids.back(), bias});
    }
  };
  for (const BiasedSequence& entry : params.logit_bias) add_completion(entry.ids, entry.bias);
  if (params.no_repeat_ngram_size > 0) {
    std::vector<int32_t> banned;
    history.completions(params.no_repeat_ngram_size, banned);
    for (int32_t id : banned) {
      if (id < vocab_size) out.push_back({id, kForbidden});
    }
  }
  for (const std::vector<int32_t>& ids : params.bad_words) add_completion(ids, kForbidden);
  if (num_new < params.min_tokens) {
    for (int32_t id : params.stop_ids) {
      if (id < vocab_size) out.push_back({id, kForbidden});
    }
  }
}

void EditedRow::apply(const SlotParams& params, const TokenMask& allowed,
                      const TokenHistory& history, int64_t num_new) {
  biases_.clear();
  list_biases(params, history, num_new, vocab_size_, biases_);
  for (const TokenBias& b : biases_) set(b.id, biased(logits_[b.id], b.bias));
  if (has_penalties(params)) penalize(params, history);
  if (!allowed.empty()) apply_mask(allowed, logits_, vocab_size_);
}

void EditedRow::penalize(const SlotParams& params, const TokenHistory& history) {
  for (const TokenCount& count : history.counts()) {
    if (count.id >= vocab_size_) continue;
    const float x = penalized(logits_[count.id], params.repetition_penalty, params.presence_penalty,
                              params.frequency_penalty, count.num_new);
    if (x != logits_[count.id]) set(count.id, x);
  }
}

float EditedRow::original(int32_t id) const {
  auto first = std::find_if(originals_.begin(), originals_.end(),
                            [id](const auto& entry) { return entry.first == id; });
  return first == originals_.end() ? logits_[id] : first->second;
}

}  // namespace pyengine::sampling

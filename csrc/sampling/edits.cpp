#include "sampling/edits.h"

#include <algorithm>
#include <limits>

namespace pyengine::sampling {

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

bool any_longer_than_one(const SlotParams& params) {
  return std::any_of(params.logit_bias.begin(), params.logit_bias.end(),
                     [](const BiasedSequence& entry) { return entry.ids.size() > 1; }) ||
         std::any_of(params.bad_words.begin(), params.bad_words.end(),
                     [](const std::vector<int32_t>& ids) { return ids.size() > 1; });
}

bool has_penalties(const SlotParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
         params.frequency_penalty != 0.0f;
}

}  // namespace

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

void EditedRow::apply(const SlotParams& params, const TokenMask& allowed,
                      const TokenHistory& history, int64_t num_new) {
  // Ids outside the vocabulary are refused before a slot is set; a tokenizer may know more than the
  // model, and what the model cannot say needs no ban.
  auto completes = [&](const std::vector<int32_t>& ids) {
    return ids.back() < vocab_size_ &&
           history.ends_in(ids.data(), static_cast<int64_t>(ids.size()) - 1);
  };
  for (const BiasedSequence& entry : params.logit_bias) {
    const int32_t id = entry.ids.back();
    if (completes(entry.ids)) set(id, logits_[id] + entry.bias);
  }
  if (!allowed.empty()) apply_mask(allowed, logits_, vocab_size_);
  if (has_penalties(params)) penalize(params, history);
  if (params.no_repeat_ngram_size > 0) {
    banned_.clear();
    history.completions(params.no_repeat_ngram_size, banned_);
    for (int32_t id : banned_) {
      if (id < vocab_size_) set(id, kForbidden);
    }
  }
  for (const std::vector<int32_t>& ids : params.bad_words) {
    if (completes(ids)) set(ids.back(), kForbidden);
  }
  if (num_new < params.min_tokens) {
    for (int32_t id : params.stop_ids) {
      if (id < vocab_size_) set(id, kForbidden);
    }
  }
}

void EditedRow::penalize(const SlotParams& params, const TokenHistory& history) {
  const float repetition = params.repetition_penalty;
  for (const TokenHistory::Count& count : history.counts()) {
    if (count.id >= vocab_size_) continue;
    float x = logits_[count.id];
    if (repetition != 1.0f) x = x < 0 ? x * repetition : x / repetition;
    if (count.num_new > 0) {
      x -= params.frequency_penalty * static_cast<float>(count.num_new);
      x -= params.presence_penalty;
    }
    if (x != logits_[count.id]) set(count.id, x);
  }
}

float EditedRow::original(int32_t id) const {
  auto first = std::find_if(originals_.begin(), originals_.end(),
                            [id](const auto& entry) { return entry.first == id; });
  return first == originals_.end() ? logits_[id] : first->second;
}

}  // namespace pyengine::sampling

// What a sampler slot is asked for, in the order in which it is applied.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace pyengine {

// `bias` is added to the logit of the last id where the sequence so far ends in the ids before it.
struct BiasedSequence {
  std::vector<int32_t> ids;  // one or more
  float bias;                // finite, or -infinity
};

struct SlotParams {
  // Logits are edited, in this order. "Tokens" are the prompt's and the new ones.
  std::vector<BiasedSequence> logit_bias;
  std::vector<int32_t> allowed_token_ids;  // empty: all
  float repetition_penalty = 1.0f;         // divides positive logits of tokens, multiplies others
  float presence_penalty = 0.0f;           // subtracted once from each new token's logit
  float frequency_penalty = 0.0f;          // and this once for every time it was generated
  int32_t no_repeat_ngram_size = 0;        // 0: n-grams may repeat
  std::vector<std::vector<int32_t>> bad_words;  // sequences that must not be completed
  int32_t min_tokens = 0;                       // new tokens before one of stop_ids may come
  std::vector<int32_t> stop_ids;
  bool has_processor = false;  // the caller's own edits follow the mask of Sampler::set_mask

  float temperature = 1.0f;  // 0: greedy, nothing below applies

  // Tokens are cut off, in this order; each cut works on the distribution that the one before left.
  int32_t top_k = 0;       // 0: all; tokens that tie with the k-th are kept, as in transformers
  double top_p = 1.0;      // smallest set of best tokens that reaches it; at least one
  double min_p = 0.0;      // of the best token's probability
  double typical_p = 1.0;  // tokens of nearly average surprise that reach it
  double epsilon_cutoff = 0.0;  // least probability
  double eta_cutoff = 0.0;      // least probability, lower where the entropy is high
  // Mirostat 2 in place of all cuts: surprise in bits to aim at (0: off), and how fast it adapts.
  double mirostat_tau = 0.0;
  double mirostat_eta = 0.1;

  uint64_t seed = 0;          // of the request
  uint64_t sample_index = 0;  // which of the request's n samples
  int32_t logprobs = -1;      // -1: none; n: the chosen token's and the n best ones'
  // For measurements: taken in place of the tokens drawn, the first one at position `num_prompt`.
  std::vector<int32_t> replay;

  // Beam search, above 0: log-probabilities are edited instead of logits, and the best so many of
  // them are listed. What temperature and cut-offs say does not matter then.
  int32_t num_candidates = 0;

  // Whether the sum that makes logits log-probabilities is needed.
  bool is_scored() const { return logprobs >= 0 || num_candidates > 0; }
};

// The sequence that a slot goes on with: a new request's, or that of one that was preempted.
struct SlotStart {
  const int32_t* tokens = nullptr;  // (num_tokens,) prompt and new ones
  int64_t num_tokens = 0;
  int64_t num_prompt = 0;
  // As the last step reported it; NaN: no token was drawn yet.
  double mirostat_mu = std::numeric_limits<double>::quiet_NaN();
};

}  // namespace pyengine

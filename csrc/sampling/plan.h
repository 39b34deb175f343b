// A step's sampled rows as a device samples them (csrc/cuda/sampling.cu): what it has to know, in
// arrays that go there as they are, and what comes back. Sampler::plan writes the first half,
// Sampler::conclude reads the second.
#pragma once

#include <cstdint>
#include <vector>

namespace pyengine::sampling {

// Instead of a token (StepResult).
constexpr int32_t kNotFinite = -1, kNoneLeft = -2;

struct TokenBias {
  int32_t id;
  float bias;  // added to the token's logit; -infinity: it is forbidden
};

struct TokenCount {
  int32_t id;
  int32_t num_new;  // times generated; 0: in the prompt alone
};

struct RowPlan {
  uint64_t seed = 0, sample_index = 0;
  double top_p = 1, min_p = 0, typical_p = 1, epsilon_cutoff = 0, eta_cutoff = 0;
  double mirostat_tau = 0, mirostat_eta = 0, mirostat_mu = 0;
  float temperature = 0;
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  uint32_t position = 0;
  int32_t draft = -1;   // the token that the row takes for that of the row before; -1: follows none
  int32_t replay = -1;  // taken in place of the token drawn; -1: none
  int32_t top_k = 0;
  // In the plan's arrays. Biases: ids rising, those of one id in order. Penalties: each id once.
  int32_t first_bias = 0, num_biases = 0, first_penalty = 0, num_penalties = 0;
  int32_t first_mask_word = -1;  // of ceil(V / 32); -1: no mask
  // Of the model's logits the best so many are listed; of the edited log-probabilities, if
  // num_candidates is above 0, the best so many, in place of a draw. Where they go: the candidates
  // behind the others.
  int32_t num_listed = 0, num_candidates = 0, first_listed = 0;
  bool is_edited = false, is_scored = false;
};

struct RowOutcome {
  double log_total;    // log sum exp of the logits, if the row is scored
  double mirostat_mu;  // after the draw
  int32_t token;       // or StepResult::kNotFinite, kNoneLeft
  float logit;         // of the token, before any edit
  int32_t num_listed, num_candidates;
};

struct ListedToken {
  int32_t id;
  float value;  // what the tokens were ranked by
  float logit;  // before any edit
};

struct SamplingPlan {
  std::vector<RowPlan> rows;
  std::vector<TokenBias> biases;
  std::vector<TokenCount> penalties;
  std::vector<uint32_t> masks;  // as TokenMask

  std::vector<RowOutcome> outcomes;  // (R,)
  std::vector<ListedToken> listed;   // of each row from first_listed on, each list in any order

  void clear() {
    rows.clear();
    biases.clear();
    penalties.clear();
    masks.clear();
    outcomes.clear();
    listed.clear();
  }
};

}  // namespace pyengine::sampling

// Logits to tokens: temperature, top-k, top-p, greedy choice, log-probabilities.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "ops/exec_context.h"
#include "sampling/row.h"

namespace pyengine {

struct SlotParams {
  float temperature = 1.0f;  // 0: greedy
  int32_t top_k = 0;         // 0: all; tokens that tie with the k-th are kept, as in transformers
  double top_p = 1.0;  // smallest set of best tokens whose probability reaches it; at least one
  uint64_t seed = 0;   // of the request
  uint64_t sample_index = 0;  // which of the request's n samples
  int32_t logprobs = -1;      // -1: none; n: the chosen token's and the n best ones'
};

struct StepResult {
  // Instead of a token: the row's logits hold NaN or +infinity, or are all -infinity. The other
  // rows are not affected.
  static constexpr int32_t kNotFinite = -1;

  std::vector<int32_t> token_ids;  // (R,) kNotFinite: see there
  std::vector<float> logprobs;     // (R,) NaN where none were asked for
  // (R, n of each) token id, log-probability; best first, equals by lower id
  std::vector<std::vector<std::pair<int32_t, float>>> top_logprobs;

  // Of the rows that were scored, not sampled (GPT2::step).
  std::vector<float> scores;  // (R,) log-probability of the target; NaN: the logits are no numbers
  std::vector<std::vector<std::pair<int32_t, float>>> score_tops;  // (R, top_n) as above
};

class Sampler {
 public:
  explicit Sampler(int32_t num_slots);

  int32_t num_slots() const { return static_cast<int32_t>(slots_.size()); }

  // Throws RequestError naming the parameter.
  void set(int32_t slot, const SlotParams& params);
  void require_slot(int32_t slot) const;

  // One token per row of logits (R, vocab_size). The random number of row r depends on its slot's
  // seed and sample_index and on positions[r], the position that the new token will have.
  // A row whose logits are not numbers gets kNotFinite.
  void sample(ExecContext& ctx, const float* logits, int64_t num_rows, int32_t vocab_size,
              const int32_t* slots, const int32_t* positions, StepResult& result);

 private:
  struct Workspace {
    sampling::Row row;
    std::vector<sampling::Candidate> candidates;
  };

  static void sample_row(Workspace& workspace, const float* logits, int32_t vocab_size,
                         const SlotParams& params, int32_t position, int64_t r, StepResult& result);
  static void add_logprobs(Workspace& workspace, const float* logits, int32_t vocab_size,
                           double log_total, int32_t top_n, int64_t r, StepResult& result);

  std::vector<SlotParams> slots_;
  std::vector<Workspace> workspaces_;  // one per worker, grown once
  std::vector<int32_t> scored_rows_;
  std::vector<double> log_totals_;
};

}  // namespace pyengine

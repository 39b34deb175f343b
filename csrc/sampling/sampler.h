// Logits to tokens: edits, temperature, cut-offs, the draw, log-probabilities; parameters and state
// of each request by slot.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "ops/exec_context.h"
#include "sampling/edits.h"
#include "sampling/history.h"
#include "sampling/params.h"
#include "sampling/plan.h"
#include "sampling/row.h"

namespace pyengine {

struct BeamCandidate {
  int32_t id;
  float score;    // edited log-probability
  float logprob;  // as the model has it
};

struct StepResult {
  // Instead of a token, where a row has none; the other rows are not affected.
  static constexpr int32_t kNotFinite =
      sampling::kNotFinite;  // logits hold NaN or +infinity, or are all -infinity
  static constexpr int32_t kNoneLeft =
      sampling::kNoneLeft;  // the request's own edits forbid every token
  static constexpr int32_t kProcessorFailed = -3;
  static constexpr int32_t kSkipped = -4;  // a draft that the row depends on was not drawn

  std::vector<int32_t> token_ids;  // (R,)
  std::vector<float> logprobs;     // (R,) NaN where none were asked for
  // (R, n of each) token id, log-probability; best first, equals by lower id
  std::vector<std::vector<std::pair<int32_t, float>>> top_logprobs;
  std::vector<double> mirostat_mu;  // (R,) after the row's draw; empty if no row uses Mirostat
  // (R,) of rows whose slot asks for candidates, best first: fewer where edits forbid the others;
  // the first is the row's token. Empty if no row asks.
  std::vector<std::vector<BeamCandidate>> candidates;

  // Of the rows that were scored, not sampled (GPT2::step).
  std::vector<float> scores;  // (R,) log-probability of the target; NaN: the logits are no numbers
  std::vector<std::vector<std::pair<int32_t, float>>> score_tops;  // (R, top_n) as above
};

class Sampler {
 public:
  // Edits logits (vocab_size,) of a slot whose sequence has tokens[0, n); false: it failed. Called
  // by the thread that called sample(), for one row after another.
  using Processor = std::function<bool(int32_t slot, const int32_t* tokens, int64_t n,
                                       float* logits, int32_t vocab_size)>;

  explicit Sampler(int32_t num_slots);

  int32_t num_slots() const { return static_cast<int32_t>(slots_.size()); }

  // Throws RequestError naming the parameter.
  void set(int32_t slot, SlotParams params, const SlotStart& start = {});
  void require_slot(int32_t slot) const;

  // Which tokens the next ones may be: a mask for the slot's first row, one for its second, ...;
  // holds for one call of sample().
  void set_masks(int32_t slot, const uint32_t* words, int64_t num_masks, int64_t words_of_each);

  void set_processor(Processor processor) { processor_ = std::move(processor); }

  // One token per row of logits (R, vocab_size), which are edited in place. The random number of
  // row r depends on its slot's seed and sample_index and on positions[r], the position that the
  // new token will have. A slot that keeps a history has one group of rows at most, and its tokens
  // join it.
  // drafts (R,), or null: where drafts[r] >= 0, row r follows row r - 1 of the same slot and the
  // position before, and its logits take drafts[r] for that row's token. It gives a token if that
  // row has drawn this very token, else kSkipped.
  // block_max: of the logits, as ops::head makes it, or null.
  void sample(ExecContext& ctx, float* logits, int64_t num_rows, int32_t vocab_size,
              const int32_t* slots, const int32_t* positions, StepResult& result,
              const int32_t* drafts = nullptr, const float* block_max = nullptr);

  // The same on a device, which does what `plan` says and returns its outcomes, between two calls
  // of which the second gets what the first got. Rows whose logits the host must see go through
  // sample() instead.
  bool needs_logits(int32_t slot) const { return slots_[slot].params.has_processor; }
  void plan(int64_t num_rows, int32_t vocab_size, const int32_t* slots, const int32_t* positions,
            const int32_t* drafts, sampling::SamplingPlan& plan);
  void conclude(int64_t num_rows, int32_t vocab_size, const int32_t* slots,
                const int32_t* positions, const int32_t* drafts, const sampling::SamplingPlan& plan,
                StepResult& result);

  // What transformers calls processed scores, in place of the logits: edited, divided by the
  // temperature (as they are if that is 0), -infinity where cut off. Changes no state.
  void process(ExecContext& ctx, float* logits, int64_t num_rows, int32_t vocab_size,
               const int32_t* slots, const int32_t* positions);

 private:
  struct Slot {
    SlotParams params;
    bool is_edited = false;  // any edit but a mask
    bool keeps_history = false;
    sampling::TokenHistory history;
    sampling::TokenMask allowed;             // of allowed_token_ids
    std::vector<sampling::TokenMask> masks;  // of set_masks, empty where there are none
    int64_t num_prompt = 0;
    double mirostat_mu = 0;
    int64_t last_call = 0;  // of sample(): finds slots that occur twice
  };
  struct Workspace {
    sampling::Row row;
    sampling::EditedRow edited;
    std::vector<sampling::Candidate> candidates;
  };
  struct Rows {  // of one call
    float* logits;
    int64_t count;
    int32_t vocab_size;
    const int32_t* slots;
    const int32_t* positions;
    const int32_t* drafts;   // or null
    const float* block_max;  // or null
    bool follows(int64_t r) const { return drafts != nullptr && drafts[r] >= 0; }
    float* of(int64_t r) const { return logits + r * vocab_size; }
    const float* block_max_of(int64_t r) const {
      constexpr int32_t kBlock = sampling::Row::kBlock;
      return block_max == nullptr ? nullptr : block_max + r * ((vocab_size + kBlock - 1) / kBlock);
    }
  };

  void require_rows(const Rows& rows);
  bool is_masked(const Slot& slot, size_t place) const {
    return place < slot.masks.size() && !slot.masks[place].empty();
  }
  void start(const Rows& rows, StepResult& result);
  void sum_logits(ExecContext& ctx, const Rows& rows);
  // place: of the row among its slot's.
  void edit(const Rows& rows, int64_t r, size_t place, Workspace& workspace);
  // sample_row(r) for rows [first, last): one, and those that follow it, as long as drafts hold.
  template <class SampleRow>
  static void sample_group(const Rows& rows, int64_t first, int64_t last, StepResult& result,
                           SampleRow&& sample_row) {
    int64_t r = first;
    do {
      sample_row(r);
      ++r;
    } while (r < last && result.token_ids[r - 1] == rows.drafts[r]);
    std::fill(result.token_ids.begin() + r, result.token_ids.begin() + last, StepResult::kSkipped);
  }
  float logprob(int64_t r, float logit) const {
    return static_cast<float>(logit - row_log_total_[r]);
  }
  void sample_row(const ExecContext& ctx, const Rows& rows, int64_t r, size_t place,
                  Workspace& workspace, StepResult& result);
  int32_t run_processor(const Rows& rows, int64_t r);
  // A row's token is known.
  void take(const Rows& rows, int64_t r, int32_t token, StepResult& result);
  void finish(const ExecContext& ctx, const Rows& rows, int64_t r, Workspace& workspace,
              bool was_edited, StepResult& result);
  // The best of a loaded row of edited log-probabilities; original(id): before they were edited.
  template <class Original>
  void list_candidates(const ExecContext& ctx, const Rows& rows, int64_t r, Workspace& workspace,
                       Original&& original, StepResult& result);
  sampling::RowPlan plan_row(const Rows& rows, int64_t r, size_t place,
                             sampling::SamplingPlan& plan) const;
  void conclude_row(const Rows& rows, int64_t r, const sampling::SamplingPlan& plan,
                    StepResult& result);

  std::vector<Slot> slots_;
  Processor processor_;
  std::vector<Workspace> workspaces_;  // one per worker, grown once
  std::vector<int64_t> group_starts_;  // of each group of rows, and the number of rows
  std::vector<int32_t> scored_rows_;
  std::vector<double> log_totals_;       // of scored_rows_
  std::vector<double> row_log_total_;    // (R,) where log-probabilities are wanted
  std::vector<int32_t> processed_rows_;  // of slots with a processor
  std::vector<std::vector<float>> processed_originals_;
  int64_t num_calls_ = 0;
};

}  // namespace pyengine

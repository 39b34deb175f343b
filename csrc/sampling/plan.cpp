// The host's share of sampling on a device: what each row has to know, and what its token changes.
#include "sampling/plan.h"

#include <algorithm>

#include "sampling/sampler.h"

namespace pyengine {

using sampling::ListedToken;
using sampling::TokenHistory;
using sampling::TokenMask;

namespace {

int32_t end_of_lists(const sampling::RowPlan& row) {
  return row.first_listed + row.num_listed + row.num_candidates;
}

// One of a row's lists, best first.
std::vector<ListedToken> best_first(const ListedToken* begin, int32_t n) {
  std::vector<ListedToken> best(begin, begin + n);
  std::sort(best.begin(), best.end(), [](const ListedToken& a, const ListedToken& b) {
    return ops::better(a.value, a.id, b.value, b.id);
  });
  return best;
}

}  // namespace

void Sampler::plan(int64_t num_rows, int32_t vocab_size, const int32_t* slots,
                   const int32_t* positions, const int32_t* drafts, sampling::SamplingPlan& plan) {
  const Rows rows{nullptr, num_rows, vocab_size, slots, positions, drafts, nullptr};
  require_rows(rows);
  plan.clear();
  for (int64_t first = 0, last; first < num_rows; first = last) {
    TokenHistory& history = slots_[slots[first]].history;
    const bool keeps_history = slots_[slots[first]].keeps_history;
    for (last = first; last == first || (last < num_rows && rows.follows(last)); ++last) {
      if (last > first && keeps_history) history.append(drafts[last]);
      plan.rows.push_back(plan_row(rows, last, static_cast<size_t>(last - first), plan));
    }
    for (int64_t r = first + 1; r < last && keeps_history; ++r) history.remove_last();
  }
  plan.outcomes.resize(num_rows);
  if (num_rows > 0) {
    plan.listed.resize(end_of_lists(plan.rows.back()));
  }
}

sampling::RowPlan Sampler::plan_row(const Rows& rows, int64_t r, size_t place,
                                    sampling::SamplingPlan& plan) const {
  const Slot& slot = slots_[rows.slots[r]];
  const SlotParams& p = slot.params;
  sampling::RowPlan row;
  row.seed = p.seed;
  row.sample_index = p.sample_index;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.typical_p = p.typical_p;
  row.epsilon_cutoff = p.epsilon_cutoff;
  row.eta_cutoff = p.eta_cutoff;
  row.mirostat_tau = p.mirostat_tau;
  row.mirostat_eta = p.mirostat_eta;
  row.mirostat_mu = slot.mirostat_mu;
  row.temperature = p.temperature;
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  row.position = static_cast<uint32_t>(rows.positions[r]);
  row.draft = rows.follows(r) ? rows.drafts[r] : -1;
  const auto replayed = static_cast<size_t>(rows.positions[r] - slot.num_prompt);
  if (replayed < p.replay.size()) row.replay = p.replay[replayed];
  row.top_k = p.top_k;
  row.is_scored = p.is_scored();
  if (!plan.rows.empty()) row.first_listed = end_of_lists(plan.rows.back());
  row.num_listed = std::clamp(p.logprobs, 0, rows.vocab_size);
  row.num_candidates = std::min(p.num_candidates, rows.vocab_size);

  row.first_bias = static_cast<int32_t>(plan.biases.size());
  if (slot.is_edited) {
    sampling::list_biases(p, slot.history, rows.positions[r] - slot.num_prompt, rows.vocab_size,
                          plan.biases);
  }
  std::stable_sort(plan.biases.begin() + row.first_bias, plan.biases.end(),
                   [](const auto& a, const auto& b) { return a.id < b.id; });
  row.num_biases = static_cast<int32_t>(plan.biases.size()) - row.first_bias;

  row.first_penalty = static_cast<int32_t>(plan.penalties.size());
  if (sampling::has_penalties(p)) {
    for (const sampling::TokenCount& count : slot.history.counts()) {
      const bool matters = count.num_new > 0 || p.repetition_penalty != 1.0f;
      if (matters && count.id < rows.vocab_size) plan.penalties.push_back(count);
    }
  }
  row.num_penalties = static_cast<int32_t>(plan.penalties.size()) - row.first_penalty;

  const TokenMask* grammar = is_masked(slot, place) ? &slot.masks[place] : nullptr;
  if (grammar != nullptr || !slot.allowed.empty()) {
    row.first_mask_word = static_cast<int32_t>(plan.masks.size());
    const auto word_of = [](const TokenMask& mask, size_t w) {
      return w < mask.size() ? mask[w] : 0;
    };
    for (size_t w = 0; w < (static_cast<size_t>(rows.vocab_size) + 31) / 32; ++w) {
      uint32_t word = slot.allowed.empty() ? ~uint32_t{0} : word_of(slot.allowed, w);
      if (grammar != nullptr) word &= word_of(*grammar, w);
      plan.masks.push_back(word);
    }
  }
  row.is_edited = row.num_biases > 0 || row.num_penalties > 0 || row.first_mask_word >= 0 ||
                  row.num_candidates > 0;
  return row;
}

void Sampler::conclude(int64_t num_rows, int32_t vocab_size, const int32_t* slots,
                       const int32_t* positions, const int32_t* drafts,
                       const sampling::SamplingPlan& plan, StepResult& result) {
  const Rows rows{nullptr, num_rows, vocab_size, slots, positions, drafts, nullptr};
  start(rows, result);
  row_log_total_.resize(num_rows);
  for (size_t i = 0; i + 1 < group_starts_.size(); ++i) {
    sample_group(rows, group_starts_[i], group_starts_[i + 1], result,
                 [&](int64_t r) { conclude_row(rows, r, plan, result); });
  }
  for (int64_t r = 0; r < num_rows; ++r) slots_[slots[r]].masks.clear();
}

void Sampler::conclude_row(const Rows& rows, int64_t r, const sampling::SamplingPlan& plan,
                           StepResult& result) {
  const sampling::RowPlan& planned = plan.rows[r];
  const sampling::RowOutcome& outcome = plan.outcomes[r];
  row_log_total_[r] = outcome.log_total;
  if (outcome.token == StepResult::kNotFinite) {
    result.token_ids[r] = outcome.token;
    return;
  }
  const ListedToken* const listed = plan.listed.data() + planned.first_listed;
  for (const ListedToken& t : best_first(listed, outcome.num_listed)) {
    result.top_logprobs[r].emplace_back(t.id, logprob(r, t.logit));
  }
  result.token_ids[r] = outcome.token;
  if (outcome.token < 0) return;
  if (planned.num_candidates > 0) {
    for (const ListedToken& t : best_first(listed + planned.num_listed, outcome.num_candidates)) {
      result.candidates[r].push_back({t.id, t.value, logprob(r, t.logit)});
    }
    result.token_ids[r] = result.candidates[r].front().id;
    return;
  }
  slots_[rows.slots[r]].mirostat_mu = outcome.mirostat_mu;
  take(rows, r, outcome.token, result);
  if (planned.is_scored) result.logprobs[r] = logprob(r, outcome.logit);
}

}  // namespace pyengine

#include "sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/errors.h"
#include "ops/ops.h"
#include "sampling/philox.h"

namespace pyengine {

using sampling::Candidate;
using sampling::Row;

namespace {

int32_t draw(const std::vector<Candidate>& candidates, double u) {
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  const double target = u * total;
  double sum = 0;
  int32_t chosen = candidates.front().id;
  for (const Candidate& c : candidates) {
    if (c.weight == 0.0f) continue;
    chosen = c.id;
    sum += c.weight;
    if (sum > target) break;
  }
  return chosen;
}

int32_t choose(Row& row, std::vector<Candidate>& candidates, const SlotParams& params,
               int32_t vocab_size, double u) {
  const bool cut_k = params.top_k > 0 && params.top_k < vocab_size;
  const bool cut_p = params.top_p < 1.0;
  if (!cut_k && !cut_p) return row.draw_from_all(u * row.all_weights(params.temperature));

  double total = 0;
  if (cut_k) {
    row.select_top_k(params.top_k, candidates);
    const float scale = sampling::inverse_temperature(params.temperature);
    for (Candidate& c : candidates) {
      c.weight = sampling::exp_nonpositive((c.logit - row.max()) * scale);
      total += c.weight;
    }
  } else {
    total = row.all_weights(params.temperature);
    // Tokens lighter than this weigh less than (1 - top_p) of the total all together, so the set
    // that reaches top_p has none of them. The factor leaves room for rounding.
    double light = (1.0 - params.top_p) * total / vocab_size * 0.5;
    float threshold = row.max() + static_cast<float>(std::log(light)) * params.temperature;
    // (max is among them also where the difference is lost to rounding)
    row.select_at_least(std::min(threshold, row.max()), candidates);
    for (Candidate& c : candidates) c.weight = row.weight(c.id);
  }
  if (cut_p) keep_top_p(params.top_p, total, candidates);
  return draw(candidates, u);
}

}  // namespace

Sampler::Sampler(int32_t num_slots) {
  if (num_slots < 1) {
    throw ConfigError("a sampler needs at least 1 slot, not " + std::to_string(num_slots));
  }
  slots_.resize(num_slots);
}

void Sampler::require_slot(int32_t slot) const {
  if (slot < 0 || slot >= num_slots()) {
    throw RequestError("request slot " + std::to_string(slot) +
                       " does not exist: the sampler has " + std::to_string(num_slots()));
  }
}

void Sampler::set(int32_t slot, const SlotParams& params) {
  require_slot(slot);
  auto require = [](bool ok, const char* what, double value) {
    if (!ok) throw RequestError(std::string(what) + ", not " + std::to_string(value));
  };
  require(params.temperature >= 0 && std::isfinite(params.temperature),
          "temperature must be 0 (greedy) or a positive number", params.temperature);
  require(params.top_k >= 0, "top_k must be 0 (all tokens) or positive", params.top_k);
  require(params.top_p >= 0 && params.top_p <= 1, "top_p must lie in [0, 1]", params.top_p);
  require(params.logprobs >= -1, "logprobs must be -1 (none), 0 or positive", params.logprobs);
  slots_[slot] = params;
}

void Sampler::sample(ExecContext& ctx, const float* logits, int64_t num_rows, int32_t vocab_size,
                     const int32_t* slots, const int32_t* positions, StepResult& result) {
  for (int64_t r = 0; r < num_rows; ++r) require_slot(slots[r]);
  result.token_ids.assign(num_rows, 0);
  result.logprobs.assign(num_rows, std::numeric_limits<float>::quiet_NaN());
  result.top_logprobs.assign(num_rows, {});
  if (workspaces_.size() < static_cast<size_t>(ctx.pool.num_threads())) {
    workspaces_.resize(ctx.pool.num_threads());
  }
  ctx.pool.parallel_for(num_rows, [&](int64_t r, int worker) {
    sample_row(workspaces_[worker], logits + r * vocab_size, vocab_size, slots_[slots[r]],
               positions[r], r, result);
  });
  scored_rows_.clear();
  for (int64_t r = 0; r < num_rows; ++r) {
    const bool wanted = slots_[slots[r]].logprobs >= 0;
    if (wanted && result.token_ids[r] != StepResult::kNotFinite) {
      scored_rows_.push_back(static_cast<int32_t>(r));
    }
  }
  if (scored_rows_.empty()) return;
  log_totals_.resize(scored_rows_.size());
  const auto num_scored = static_cast<int64_t>(scored_rows_.size());
  ops::log_sum_exp(ctx, logits, vocab_size, scored_rows_.data(), num_scored, log_totals_.data());
  ctx.pool.parallel_for(num_scored, [&](int64_t i, int worker) {
    const int32_t r = scored_rows_[i];
    add_logprobs(workspaces_[worker], logits + static_cast<int64_t>(r) * vocab_size, vocab_size,
                 log_totals_[i], slots_[slots[r]].logprobs, r, result);
  });
}

void Sampler::sample_row(Workspace& workspace, const float* logits, int32_t vocab_size,
                         const SlotParams& params, int32_t position, int64_t r,
                         StepResult& result) {
  Row& row = workspace.row;
  if (!row.load(logits, vocab_size)) {
    result.token_ids[r] = StepResult::kNotFinite;
  } else if (params.temperature == 0.0f) {
    result.token_ids[r] = row.argmax();
  } else {
    const double u = uniform(params.seed, static_cast<uint32_t>(position), params.sample_index);
    result.token_ids[r] = choose(row, workspace.candidates, params, vocab_size, u);
  }
}

void Sampler::add_logprobs(Workspace& workspace, const float* logits, int32_t vocab_size,
                           double log_total, int32_t top_n, int64_t r, StepResult& result) {
  result.logprobs[r] = static_cast<float>(logits[result.token_ids[r]] - log_total);
  const int32_t count = std::min(top_n, vocab_size);
  if (count == 0) return;
  std::vector<Candidate>& best = workspace.candidates;
  workspace.row.load(logits, vocab_size);
  workspace.row.select_top_k(count, best);
  std::partial_sort(best.begin(), best.begin() + count, best.end(), sampling::better);
  for (int32_t i = 0; i < count; ++i) {
    result.top_logprobs[r].emplace_back(best[i].id, static_cast<float>(best[i].logit - log_total));
  }
}

}  // namespace pyengine

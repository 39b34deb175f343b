#include "sampling/choice.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling/cutoffs.h"

namespace pyengine::sampling {

namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// The logit below which a token surely weighs less than `weight`, rounding included; at most max.
float logit_of_weight(const Row& row, double weight, float temperature) {
  const float below = static_cast<float>(std::log(weight)) - 1e-4f;
  return std::clamp(row.max() + below * temperature, kLowest, row.max());
}

void set_weights(const Row& row, float scale, std::vector<Candidate>& candidates) {
  for (Candidate& c : candidates) c.weight = exp_nonpositive((c.logit - row.max()) * scale);
}

// Tokens that weigh at least `weight`, found without a look at most of the others.
void select_by_weight(const Row& row, double weight, float temperature,
                      std::vector<Candidate>& candidates) {
  row.select_at_least(logit_of_weight(row, weight, temperature), candidates);
  set_weights(row, inverse_temperature(temperature), candidates);
}

int32_t draw(const std::vector<Candidate>& candidates, double u) {
  const double target = u * total_weight(candidates);
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

}  // namespace

Kept cut_off(Row& row, const SlotParams& params, double mirostat_mu, int32_t vocab_size,
             std::vector<Candidate>& candidates, double& total) {
  const float temperature = params.temperature;
  const float scale = inverse_temperature(temperature);
  if (params.mirostat_tau > 0) {
    // Tokens whose surprise -log2 p exceeds mu are cut off (Basu et al. 2021, as in llama.cpp).
    const double least = std::min(std::exp2(-mirostat_mu) * row.all_weights(temperature), 1.0);
    select_by_weight(row, least, temperature, candidates);
    keep_min_p(least, candidates);
    return Kept::candidates;
  }
  const bool cut_k = params.top_k > 0 && params.top_k < vocab_size;
  const bool cut_p = params.top_p < 1.0;
  const bool cut_typical = params.typical_p < 1.0;
  if (cut_k) {
    row.select_top_k(params.top_k, candidates);
    set_weights(row, scale, candidates);
    if (cut_p) keep_top_p(params.top_p, total_weight(candidates), candidates);
  } else if (cut_p) {
    row.all_weights(temperature);
    total = row.keep_top_p(params.top_p);
    if (!cut_typical && params.epsilon_cutoff == 0 && params.eta_cutoff == 0) {
      if (params.min_p > 0) total = row.keep_at_least(params.min_p);
      return Kept::weighted;
    }
    row.select_weighted(candidates);
  } else if (params.min_p > 0) {
    select_by_weight(row, params.min_p, temperature, candidates);
  } else if (cut_typical || params.eta_cutoff > 0) {
    row.select_at_least(kLowest, candidates);
    set_weights(row, scale, candidates);
  } else if (params.epsilon_cutoff > 0) {
    const double least = std::min(params.epsilon_cutoff * row.all_weights(temperature), 1.0);
    select_by_weight(row, least, temperature, candidates);
    keep_min_p(least, candidates);
    return Kept::candidates;
  } else {
    total = row.all_weights(temperature);
    return Kept::all;
  }
  if (params.min_p > 0) keep_min_p(params.min_p, candidates);
  if (cut_typical) keep_typical(params.typical_p, row.max(), scale, candidates);
  // The best token may be gone now: what follows compares with the best of those that are left.
  if (params.epsilon_cutoff > 0) keep_epsilon(params.epsilon_cutoff, candidates);
  if (params.eta_cutoff > 0) keep_eta(params.eta_cutoff, row.max(), scale, candidates);
  return Kept::candidates;
}

int32_t choose(Row& row, const SlotParams& params, int32_t vocab_size, double u,
               std::vector<Candidate>& candidates, double& mirostat_mu) {
  if (params.temperature == 0.0f) return row.argmax();
  double total = 0;
  if (cut_off(row, params, mirostat_mu, vocab_size, candidates, total) != Kept::candidates) {
    return row.draw_from_all(u * total);
  }
  const int32_t chosen = draw(candidates, u);
  if (params.mirostat_tau > 0) {
    const auto drawn = std::find_if(candidates.begin(), candidates.end(),
                                    [chosen](const Candidate& c) { return c.id == chosen; });
    const double surprise = std::log2(total_weight(candidates) / drawn->weight);
    mirostat_mu -= params.mirostat_eta * (surprise - params.mirostat_tau);
  }
  return chosen;
}

}  // namespace pyengine::sampling

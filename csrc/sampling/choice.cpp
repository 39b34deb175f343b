#include "sampling/choice.h"

#include <algorithm>

#include "sampling/cutoffs.h"

namespace pyengine::sampling {

namespace {

void set_weights(const Row& row, float scale, std::vector<Candidate>& candidates) {
  for (Candidate& c : candidates) c.weight = weight_of(c.logit, row.max(), scale);
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
    const double of_all = row.weights_at_least(0.0, temperature);
    total = row.keep_at_least(least_by_mirostat(mirostat_mu, of_all));
    return Kept::weighted;
  }
  const bool cut_k = params.top_k > 0 && params.top_k < vocab_size;
  const bool cut_p = params.top_p < 1.0;
  const bool cut_typical = params.typical_p < 1.0;
  if (cut_k) {
    row.select_top_k(params.top_k, candidates);
    set_weights(row, scale, candidates);
    if (cut_p) keep_top_p(params.top_p, total_weight(candidates), candidates);
    if (params.min_p > 0) keep_min_p(params.min_p, candidates);
  } else {
    total = row.weights_at_least(cut_p ? 0.0 : params.min_p, temperature);
    if (cut_p) {
      total = row.keep_top_p(params.top_p);
      if (params.min_p > 0) total = row.keep_at_least(params.min_p);
    }
    if (!cut_typical && params.eta_cutoff == 0) {
      const bool cut_epsilon = params.epsilon_cutoff > 0;
      if (cut_epsilon) total = row.keep_at_least(least_by_epsilon(params.epsilon_cutoff, total, 1));
      return cut_p || params.min_p > 0 || cut_epsilon ? Kept::weighted : Kept::all;
    }
    row.select_weighted(candidates);
  }
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
  const Kept kept = cut_off(row, params, mirostat_mu, vocab_size, candidates, total);
  const int32_t chosen =
      kept == Kept::candidates ? draw(candidates, u) : row.draw_from_all(u * total);
  if (params.mirostat_tau > 0) {
    mirostat_mu = next_mirostat_mu(mirostat_mu, params.mirostat_tau, params.mirostat_eta, total,
                                   row.weight(chosen));
  }
  return chosen;
}

}  // namespace pyengine::sampling

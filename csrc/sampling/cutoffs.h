// Which of the candidates stay: top-p, min-p, typical, epsilon and eta sampling. Each cut keeps at
// least one candidate, and the order of those that stay.
#pragma once

#include <vector>

#include "sampling/row.h"

namespace pyengine::sampling {

double total_weight(const std::vector<Candidate>& candidates);

// Keeps the smallest set of best ones whose weight reaches top_p of `total`, the sum of the weights
// or what they are a part of.
void keep_top_p(double top_p, double total, std::vector<Candidate>& candidates);

// Keeps those whose probability is at least min_p of the best one's (Nguyen et al. 2024).
void keep_min_p(double min_p, std::vector<Candidate>& candidates);

// Locally typical sampling (Meister et al. 2022): keeps those whose surprise -log p is nearest to
// the entropy, until they reach `mass`; ties with the last of them stay. `scale`, 1 / temperature,
// and `max`, the best logit, say how logits became weights.
void keep_typical(double mass, float max, float scale, std::vector<Candidate>& candidates);

// Keeps those with a probability of at least epsilon (Hewitt et al. 2022).
void keep_epsilon(double epsilon, std::vector<Candidate>& candidates);

// Keeps those with a probability of at least min(epsilon, sqrt(epsilon) exp(-entropy)) (same
// paper).
void keep_eta(double epsilon, float max, float scale, std::vector<Candidate>& candidates);

}  // namespace pyengine::sampling

#include "sampling/cutoffs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pyengine::sampling {

namespace {

template <class Dropped>
void drop(std::vector<Candidate>& candidates, Dropped dropped) {
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), dropped), candidates.end());
}

// Log-probabilities of candidates among themselves: log p = log_weight - log_total.
struct LogProbabilities {
  LogProbabilities(float max, float scale, const std::vector<Candidate>& candidates)
      : max(max), scale(scale), total(total_weight(candidates)), log_total(std::log(total)) {
    for (const Candidate& c : candidates) {
      if (c.weight > 0) entropy -= c.weight / total * of(c);
    }
  }
  double of(const Candidate& c) const { return log_weight(c.logit, max, scale) - log_total; }

  float max, scale;
  double total, log_total;
  double entropy = 0;  // natural logarithm
};

struct Keyed {
  double key;
  float weight;
};

// The key at which the weights, keys rising, first reach `enough`; the last one if they never do.
// Selection by halves, without sorting: what lies before `low` is known to be too little.
double key_reaching(double enough, std::vector<Keyed>& items) {
  auto low = items.begin(), high = items.end();
  double before = 0;
  while (high - low > 1) {
    auto middle = low + (high - low - 1) / 2;
    std::nth_element(low, middle, high,
                     [](const Keyed& a, const Keyed& b) { return a.key < b.key; });
    double sum = before;
    for (auto item = low; item <= middle; ++item) sum += item->weight;
    if (sum >= enough) {
      high = middle + 1;
    } else {
      before = sum;
      low = middle + 1;
    }
  }
  return low->key;
}

}  // namespace

double total_weight(const std::vector<Candidate>& candidates) {
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  return total;
}

void keep_top_p(double top_p, double total, std::vector<Candidate>& candidates) {
  const double enough = top_p * total;
  // Weights fall into bins of a sixteenth of an octave; whole bins are kept from the heaviest
  // downwards, and only the bin in which `enough` is reached is sorted.
  constexpr int kShift = 23 - 4;
  constexpr size_t kBins = (0x3f800000u >> kShift) + 1;  // weights are at most 1
  auto bin_of = [](const Candidate& c) {
    uint32_t bits;
    std::memcpy(&bits, &c.weight, sizeof bits);
    return bits >> kShift;
  };
  std::vector<double> bin_mass(kBins, 0.0);
  for (const Candidate& c : candidates) bin_mass[bin_of(c)] += c.weight;
  size_t edge = kBins - 1;
  double mass = 0;  // of the bins above `edge`
  while (edge > 0 && mass + bin_mass[edge] < enough) mass += bin_mass[edge--];

  std::vector<Candidate> at_edge;
  for (const Candidate& c : candidates) {
    if (bin_of(c) == edge) at_edge.push_back(c);
  }
  std::sort(at_edge.begin(), at_edge.end(), better);
  size_t taken = 0;
  while (taken < at_edge.size() && (mass == 0 || mass < enough)) mass += at_edge[taken++].weight;
  auto dropped = [&](const Candidate& c) {
    const size_t bin = bin_of(c);
    return bin < edge || (bin == edge && (taken == 0 || better(at_edge[taken - 1], c)));
  };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), dropped), candidates.end());
}

void keep_min_p(double min_p, std::vector<Candidate>& candidates) {
  drop(candidates, [&](const Candidate& c) { return c.weight < min_p; });
}

void keep_typical(double mass, float max, float scale, std::vector<Candidate>& candidates) {
  const LogProbabilities log_p(max, scale, candidates);
  auto distance = [&](const Candidate& c) {
    return typical_distance(log_weight(c.logit, max, scale), log_p.log_total, log_p.entropy);
  };
  std::vector<Keyed> items;
  items.reserve(candidates.size());
  for (const Candidate& c : candidates) items.push_back({distance(c), c.weight});
  const double edge = key_reaching(mass * log_p.total, items);
  drop(candidates, [&](const Candidate& c) { return distance(c) > edge; });
}

void keep_epsilon(double epsilon, std::vector<Candidate>& candidates) {
  float best = 0;
  for (const Candidate& c : candidates) best = std::max(best, c.weight);
  const double least = least_by_epsilon(epsilon, total_weight(candidates), best);
  drop(candidates, [&](const Candidate& c) { return c.weight < least; });
}

void keep_eta(double epsilon, float max, float scale, std::vector<Candidate>& candidates) {
  const LogProbabilities log_p(max, scale, candidates);
  keep_epsilon(epsilon_of_eta(epsilon, log_p.entropy), candidates);
}

}  // namespace pyengine::sampling

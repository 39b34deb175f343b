// Passes over one row of logits. Everything runs on one thread in one fixed order, the same on
// every instruction set, so the same logits give the same token everywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ops.h"
#include "sampling/definitions.h"

namespace pyengine::sampling {

struct Candidate {
  int32_t id;
  float logit;
  float weight;  // exp((logit - max) / temperature)
};

inline bool better(const Candidate& a, const Candidate& b) {
  return ops::better(a.logit, a.id, b.logit, b.id);
}

class Row {
 public:
  static constexpr int kBlock = ops::kLogitBlock;  // logits per entry of block_max_

  // Finds the maxima. False if a logit is NaN or +inf, or all are -inf.
  // block_max: of the same logits (ops::head), which then need not be read, or null.
  bool load(const ExecContext& ctx, const float* logits, int32_t vocab_size,
            const float* block_max = nullptr);

  float max() const { return max_; }
  int32_t argmax() const;  // the lowest id of equals

  // The k best tokens and all that tie with the last of them, ids rising; weights unset.
  void select_top_k(int32_t k, std::vector<Candidate>& out);

  // All tokens with logit >= threshold, ids rising; weights unset.
  void select_at_least(float threshold, std::vector<Candidate>& out) const;

  // weights[i] = exp((logits[i] - max) / temperature) where that is at least `least`, at most 1,
  // else 0; returns their sum.
  double weights_at_least(double least, float temperature);

  // After weights_at_least(): the weights of tokens that are cut off become 0; what is left of the
  // sum. top_p < 1: keeps the smallest set of best tokens that reaches it; at least one.
  double keep_top_p(double top_p);
  double keep_at_least(double weight);  // at most 1, the weight of the best token

  float weight(int32_t id) const { return weights_[id]; }   // of the last weights_at_least()
  void select_weighted(std::vector<Candidate>& out) const;  // all that weigh anything, ids rising

  // The first token, ids rising, at which the running sum of the weights passes `target`.
  int32_t draw_from_all(double target) const;

 private:
  // Where top-p ends: the tokens that weigh more than `low` reach it, those above `high` do not.
  struct Edge {
    float low, high;
    double mass_above;  // of the tokens above `high`
  };

  bool take_maxima(const float* block_max);
  double sum_blocks() const;
  void narrow(const float* weights, int64_t n, const float* thresholds, double enough,
              double mass_of_others, Edge& edge) const;
  void narrow_to(double ratio, const float* weights, int64_t n, double enough,
                 double mass_of_others, Edge& edge) const;
  float guess_edge(double top_p, Edge edge);

  const ExecContext* ctx_ = nullptr;
  const float* logits_ = nullptr;
  int32_t vocab_size_ = 0;
  float max_ = 0;
  std::vector<float> block_max_;
  std::vector<float> weights_;
  std::vector<float> block_sum_;
  std::vector<float> scratch_;
  mutable std::vector<int32_t> indices_;
  std::vector<Candidate> edge_;
};

}  // namespace pyengine::sampling

#include "sampling/row.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace pyengine::sampling {

// False if one is NaN: the block holds an infinity or NaN.
bool Row::take_maxima(const float* block_max) {
  float best = block_max[0], sum = 0;
  for (size_t b = 0; b < block_max_.size(); ++b) {
    block_max_[b] = block_max[b];
    best = block_max[b] > best ? block_max[b] : best;
    sum += 0.0f * block_max[b];
  }
  max_ = best;
  return sum == 0.0f;
}

bool Row::load(const ExecContext& ctx, const float* logits, int32_t vocab_size,
               const float* block_max) {
  ctx_ = &ctx;
  logits_ = logits;
  vocab_size_ = vocab_size;
  block_max_.resize((vocab_size + kBlock - 1) / kBlock);
  if (block_max != nullptr && take_maxima(block_max)) return true;
  const bool are_numbers = ops::block_maxima(ctx, logits, vocab_size, block_max_.data());
  max_ = *std::max_element(block_max_.begin(), block_max_.end());
  return are_numbers && std::isfinite(max_);
}

int32_t Row::argmax() const {
  auto block = std::find(block_max_.begin(), block_max_.end(), max_) - block_max_.begin();
  const float* begin = logits_ + block * kBlock;
  return static_cast<int32_t>(std::find(begin, logits_ + vocab_size_, max_) - logits_);
}

void Row::select_at_least(float threshold, std::vector<Candidate>& out) const {
  out.clear();
  size_t count = 0;
  for (size_t b = 0; b < block_max_.size(); ++b) {
    if (block_max_[b] < threshold) continue;
    int32_t end = std::min(vocab_size_, static_cast<int32_t>((b + 1) * kBlock));
    out.resize(count + kBlock);  // room for all; which ones stay is decided without a branch
    for (int32_t id = static_cast<int32_t>(b * kBlock); id < end; ++id) {
      out[count] = {id, logits_[id], 0.0f};
      count += logits_[id] >= threshold;
    }
    out.resize(count);
  }
}

void Row::select_top_k(int32_t k, std::vector<Candidate>& out) {
  auto kth_largest = [](std::vector<float>& values, int32_t rank) {
    std::nth_element(values.begin(), values.begin() + (rank - 1), values.end(),
                     std::greater<float>());
    return values[rank - 1];
  };
  if (k >= vocab_size_) return select_at_least(-std::numeric_limits<float>::infinity(), out);
  // The k-th largest block maximum is reached by k tokens at least, and by few more.
  float bound = -std::numeric_limits<float>::infinity();
  if (static_cast<size_t>(k) <= block_max_.size()) {
    scratch_ = block_max_;
    bound = kth_largest(scratch_, k);
  }
  select_at_least(bound, out);
  scratch_.clear();
  for (const Candidate& c : out) scratch_.push_back(c.logit);
  float threshold = kth_largest(scratch_, k);
  out.erase(std::remove_if(out.begin(), out.end(),
                           [&](const Candidate& c) { return c.logit < threshold; }),
            out.end());
}

double Row::weights_at_least(double least, float temperature) {
  weights_.resize(vocab_size_);
  block_sum_.resize(block_max_.size());
  ops::exp_weights(*ctx_, logits_, block_max_.data(), vocab_size_, max_,
                   inverse_temperature(temperature), least, weights_.data(), block_sum_.data());
  return sum_blocks();
}

double Row::sum_blocks() const {
  double total = 0;
  for (float sum : block_sum_) total += sum;
  return total;
}

// thresholds rise, from `low` to `high`. The mass above one of them is that of these weights, and
// of others that are above all of them.
void Row::narrow(const float* weights, int64_t n, const float* thresholds, double enough,
                 double mass_of_others, Edge& edge) const {
  double sums[ops::kSumThresholds];
  ops::sums_above(*ctx_, weights, n, thresholds, sums);
  int first_short = 0;
  while (first_short < ops::kSumThresholds && mass_of_others + sums[first_short] >= enough) {
    ++first_short;
  }
  if (first_short < ops::kSumThresholds) {
    edge.high = thresholds[first_short];
    edge.mass_above = mass_of_others + sums[first_short];
  }
  if (first_short > 0) edge.low = thresholds[first_short - 1];
}

// Until high / low is at most `ratio`, as far as floats go.
void Row::narrow_to(double ratio, const float* weights, int64_t n, double enough,
                    double mass_of_others, Edge& edge) const {
  for (int round = 0; round < 12 && edge.high > ratio * edge.low; ++round) {
    float thresholds[ops::kSumThresholds];
    const double step = std::log(double{edge.high} / edge.low) / (ops::kSumThresholds + 1);
    for (int k = 0; k < ops::kSumThresholds; ++k) {
      const auto threshold = static_cast<float>(edge.low * std::exp(step * (k + 1)));
      thresholds[k] = std::min(threshold, edge.high);
    }
    narrow(weights, n, thresholds, enough, mass_of_others, edge);
  }
}

// Where top-p seems to end, from one weight in eight.
float Row::guess_edge(double top_p, Edge edge) {
  constexpr int32_t kOfBlock = kBlock / 8;
  scratch_.clear();
  for (int32_t begin = 0; begin < vocab_size_; begin += kBlock) {
    const auto first = weights_.begin() + begin;
    scratch_.insert(scratch_.end(), first, first + std::min(kOfBlock, vocab_size_ - begin));
  }
  const auto n = static_cast<int64_t>(scratch_.size());
  const float all[ops::kSumThresholds] = {};
  double total[ops::kSumThresholds];
  ops::sums_above(*ctx_, scratch_.data(), n, all, total);
  narrow_to(1.01, scratch_.data(), n, top_p * total[0], 0.0, edge);
  return std::sqrt(edge.low * edge.high);
}

double Row::keep_top_p(double top_p) {
  const double total = sum_blocks(), enough = top_p * total;
  // What weighs less than `low` weighs less than 1 - top_p all together (the factor leaves room for
  // rounding).
  const double light = (1.0 - top_p) * total / vocab_size_ * 0.5;
  Edge edge{static_cast<float>(std::clamp(light, 1e-37, 0.5)), 1.0f, 0.0};
  // One pass over all weights is enough: few are as near to the edge as a guess from thousands of
  // tokens is, and where few tokens weigh anything, few are anywhere near.
  constexpr float kNear = 1.04f, kFar = 1.65f;
  const float guess = guess_edge(top_p, edge);
  float thresholds[ops::kSumThresholds] = {guess / kFar, guess / kNear, guess * kNear,
                                           guess * kFar};
  for (float& t : thresholds) t = std::clamp(t, edge.low, edge.high);
  narrow(weights_.data(), vocab_size_, thresholds, enough, 0.0, edge);

  auto above = [](float x) { return std::nextafter(x, std::numeric_limits<float>::infinity()); };
  indices_.resize(vocab_size_);
  const int64_t found = ops::select_between(*ctx_, weights_.data(), vocab_size_, above(edge.low),
                                            above(edge.high), indices_.data());
  scratch_.clear();
  for (int64_t i = 0; i < found; ++i) scratch_.push_back(weights_[indices_[i]]);
  narrow_to(1.003, scratch_.data(), found, enough, edge.mass_above, edge);
  edge_.clear();
  for (int64_t i = 0; i < found; ++i) {
    const int32_t id = indices_[i];
    if (weights_[id] <= edge.low || weights_[id] > edge.high) continue;
    edge_.push_back({id, logits_[id], weights_[id]});
  }
  std::sort(edge_.begin(), edge_.end(), better);
  ops::keep_above(*ctx_, weights_.data(), vocab_size_, edge.high, block_sum_.data());
  double mass = edge.mass_above;
  for (const Candidate& c : edge_) {
    if (mass > 0 && mass >= enough) break;
    mass += c.weight;
    weights_[c.id] = c.weight;
    block_sum_[c.id / kBlock] += c.weight;
  }
  return sum_blocks();
}

double Row::keep_at_least(double weight) {
  auto threshold = static_cast<float>(weight);  // the largest float below `weight`
  if (threshold >= weight) threshold = std::nextafter(threshold, -1.0f);
  ops::keep_above(*ctx_, weights_.data(), vocab_size_, threshold, block_sum_.data());
  return sum_blocks();
}

void Row::select_weighted(std::vector<Candidate>& out) const {
  indices_.resize(vocab_size_);
  const int64_t found = ops::select_between(
      *ctx_, weights_.data(), vocab_size_, std::numeric_limits<float>::denorm_min(),
      std::numeric_limits<float>::infinity(), indices_.data());
  out.clear();
  for (int64_t i = 0; i < found; ++i) {
    out.push_back({indices_[i], logits_[indices_[i]], weights_[indices_[i]]});
  }
}

int32_t Row::draw_from_all(double target) const {
  double sum = 0;
  size_t block = 0,
         last = 0;  // last: a block to fall back on if rounding lets no block reach target
  for (; block < block_sum_.size(); ++block) {
    if (sum + block_sum_[block] > target) break;
    if (block_sum_[block] > 0) last = block;
    sum += block_sum_[block];
  }
  if (block == block_sum_.size()) {
    block = last;
    target = std::numeric_limits<double>::infinity();
  }
  int32_t end = std::min(vocab_size_, static_cast<int32_t>((block + 1) * kBlock));
  int32_t chosen = argmax();
  for (int32_t id = static_cast<int32_t>(block * kBlock); id < end; ++id) {
    if (weights_[id] == 0.0f) continue;
    chosen = id;
    sum += weights_[id];
    if (sum > target) break;
  }
  return chosen;
}

}  // namespace pyengine::sampling

#include "sampling/row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace pyengine::sampling {

namespace {

constexpr int kLanes =
    16;  // independent chains: enough for any vector width, and a fixed order of sums

// Sum of n weights, lane by lane; n <= Row::kBlock.
double block_total(const float* w, int n) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += w[i + j];
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += w[i + j];
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

float exp_nonpositive(float x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its series to r^7 / 7! (Cephes' split of ln 2).
  x = x > -87.0f ? x : -87.5f;
  float shifted =
      x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // 2^n: what lies above the low bits of `shifted` is shifted out
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x > -87.25f ? p * scale : 0.0f;
}

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

bool Row::load(const float* logits, int32_t vocab_size, const float* block_max) {
  logits_ = logits;
  vocab_size_ = vocab_size;
  int32_t blocks = (vocab_size + kBlock - 1) / kBlock;
  block_max_.resize(blocks);
  if (block_max != nullptr && take_maxima(block_max)) return true;
  int32_t is_nan[kLanes] = {};
  for (int32_t b = 0; b < blocks; ++b) {
    const float* x = logits + static_cast<int64_t>(b) * kBlock;
    int n = std::min(kBlock, vocab_size - b * kBlock);
    float lanes[kLanes];
    std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        is_nan[j] |= x[i + j] != x[i + j];
      }
    }
    for (int j = 0; i + j < n; ++j) {
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
      is_nan[j] |= x[i + j] != x[i + j];
    }
    float best = lanes[0];
    for (int j = 1; j < kLanes; ++j) best = lanes[j] > best ? lanes[j] : best;
    block_max_[b] = best;
  }
  max_ = *std::max_element(block_max_.begin(), block_max_.end());
  bool any_nan = std::any_of(is_nan, is_nan + kLanes, [](int32_t nan) { return nan != 0; });
  return !any_nan && std::isfinite(max_);
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

double Row::all_weights(float temperature) {
  weights_.resize(vocab_size_);
  block_sum_.resize(block_max_.size());
  const float max = max_;
  const float scale = inverse_temperature(temperature);
  double total = 0;
  for (size_t b = 0; b < block_max_.size(); ++b) {
    const float* x = logits_ + b * kBlock;
    float* w = weights_.data() + b * kBlock;
    int n = std::min(kBlock, vocab_size_ - static_cast<int32_t>(b * kBlock));
    for (int i = 0; i < n; ++i) w[i] = exp_nonpositive((x[i] - max) * scale);
    total += block_sum_[b] = block_total(w, n);
  }
  return total;
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

// Passes of ops.h over one row of logits or weights.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "ops/ops.h"

namespace pyengine::ops {

bool block_maxima(const ExecContext& ctx, const float* x, int64_t n, float* maxima) {
  return ctx.kernels.block_maxima(x, n, maxima);
}

void exp_weights(const ExecContext& ctx, const float* x, const float* maxima, int64_t n, float max,
                 float scale, double least, float* weights, float* block_sums) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  // Below this logit a token surely weighs less, rounding included.
  const auto below = static_cast<float>(std::log(least)) - 1e-4f;
  const float skipped = std::clamp(max + below / scale, kLowest, max);
  auto limit = static_cast<float>(least);  // the largest float below `least`
  if (limit >= least) limit = std::nextafter(limit, -1.0f);
  ctx.kernels.exp_weights(x, maxima, n, max, scale, skipped, limit, weights, block_sums);
}

void sums_above(const ExecContext& ctx, const float* weights, int64_t n, const float* thresholds,
                double* sums) {
  ctx.kernels.sums_above(weights, n, thresholds, sums);
}

void keep_above(const ExecContext& ctx, float* weights, int64_t n, float threshold,
                float* block_sums) {
  ctx.kernels.keep_above(weights, n, threshold, block_sums);
}

int64_t select_between(const ExecContext& ctx, const float* x, int64_t n, float low, float high,
                       int32_t* indices) {
  return ctx.kernels.select_between(x, n, low, high, indices);
}

}  // namespace pyengine::ops

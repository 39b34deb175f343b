// What single numbers of sampling are: edited logits, weights, thresholds. Compiled into the CPU's
// sampler and into the device's kernels (csrc/cuda/sampling.cu), so that both say the same; how
// thresholds are found is each one's own business.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/both.h"

namespace pyengine::sampling {

constexpr float kForbidden = -INFINITY;
constexpr float kLowestLogit = -3.40282347e+38f;  // of those that are not forbidden

// Rounded one by one: a product must not be fused with a sum, so that all compilers give the same
// bits.
#if defined(__CUDA_ARCH__)
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float sum(float a, float b) { return __fadd_rn(a, b); }
#else
PYENGINE_BOTH inline float product(float a, float b) { return a * b; }
PYENGINE_BOTH inline float sum(float a, float b) { return a + b; }
#endif

PYENGINE_BOTH inline float biased(float logit, float bias) {
  return bias == kForbidden ? kForbidden : sum(logit, bias);
}

// A token of the sequence, num_new times generated.
PYENGINE_BOTH inline float penalized(float logit, float repetition, float presence, float frequency,
                                     int32_t num_new) {
  if (repetition != 1.0f) logit = logit < 0 ? product(logit, repetition) : logit / repetition;
  if (num_new > 0) {
    logit = sum(logit, -product(frequency, static_cast<float>(num_new)));
    logit = sum(logit, -presence);
  }
  return logit;
}

// 1 / temperature, kept finite so that 0 * it is 0.
PYENGINE_BOTH inline float inverse_temperature(float temperature) {
  const float inverse = 1.0f / temperature;
  return inverse < -kLowestLogit ? inverse : -kLowestLogit;
}

// exp(x) for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its series to r^7 / 7!; 0 below
// -87.25. Relative error below 2e-7; bit for bit what ops::exp_weights computes.
PYENGINE_BOTH inline float exp_nonpositive(float x) {
  x = x > -87.5f ? x : -87.5f;
  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const float shifted = sum(product(x, 1.44269504f), 12582912.0f);
  const float n = sum(shifted, -12582912.0f);
  float r = sum(x, -product(n, 0.693359375f));  // Cephes' split of ln 2
  r = sum(r, -product(n, -2.12194440e-4f));
  float p = 1.9841270e-4f;
  p = sum(product(p, r), 1.3888889e-3f);
  p = sum(product(p, r), 8.3333333e-3f);
  p = sum(product(p, r), 4.1666667e-2f);
  p = sum(product(p, r), 1.6666667e-1f);
  p = sum(product(p, r), 0.5f);
  p = sum(product(p, r), 1.0f);
  p = sum(product(p, r), 1.0f);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // 2^n: what lies above the low bits of `shifted` is shifted out
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return x > -87.25f ? product(p, scale) : 0.0f;
}

// log of a token's weight, its probability over that of the best one, whose logit is `max`; `scale`
// is 1 / temperature.
PYENGINE_BOTH inline float log_weight(float logit, float max, float scale) {
  return product(sum(logit, -max), scale);
}
PYENGINE_BOTH inline float weight_of(float logit, float max, float scale) {
  return exp_nonpositive(log_weight(logit, max, scale));
}

// The logit below which a token surely weighs less than `weight`, rounding included; at most max.
PYENGINE_BOTH inline float logit_of_weight(double weight, float max, float temperature) {
  const float below = logf(static_cast<float>(weight)) - 1e-4f;
  const float logit = sum(max, product(below, temperature));
  return logit > max ? max : logit > kLowestLogit ? logit : kLowestLogit;
}

// How far a token's surprise -log p is from the entropy; log p = log_weight - log_total.
PYENGINE_BOTH inline double typical_distance(float log_weight, double log_total, double entropy) {
  return fabs(log_total - static_cast<double>(log_weight) - entropy);
}

// The least weight that epsilon sampling keeps, of tokens that weigh `total` together and of which
// the best weighs `best`: below 1 where typical sampling has cut off the best token.
PYENGINE_BOTH inline double least_by_epsilon(double epsilon, double total, float best) {
  const double least = epsilon * total;
  return least < best ? least : best;
}

// The epsilon of eta sampling; entropy in natural units.
PYENGINE_BOTH inline double epsilon_of_eta(double eta, double entropy) {
  const double low = sqrt(eta) * exp(-entropy);
  return eta < low ? eta : low;
}

// Mirostat 2 cuts off tokens whose surprise -log2 p exceeds mu (Basu et al. 2021, as in llama.cpp).
PYENGINE_BOTH inline double least_by_mirostat(double mu, double total) {
  const double least = exp2(-mu) * total;
  return least < 1.0 ? least : 1.0;
}

// mu after a token was drawn; total: of the weights that were kept.
PYENGINE_BOTH inline double next_mirostat_mu(double mu, double tau, double eta, double total,
                                             float weight) {
  return mu - eta * (log2(total / weight) - tau);
}

}  // namespace pyengine::sampling

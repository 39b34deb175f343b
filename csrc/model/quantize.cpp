#include "model/quantize.h"

#include <cmath>

namespace pyengine {

void equalize(ExecContext& ctx, const ops::Weight& w, float* gain, float* bias, float* factor) {
  ops::row_rms(ctx, w, factor);
  for (int64_t k = 0; k < w.in_features; ++k) {
    const float size = std::sqrt(gain[k] * gain[k] + bias[k] * bias[k]);
    const float ratio = std::sqrt(size / factor[k]);
    // A channel that is always zero, or that nobody reads, stays as it is.
    const bool is_useful = ratio > 1e-15f && ratio < 1e15f;
    factor[k] = is_useful ? ratio : 1.0f;
    gain[k] /= factor[k];
    bias[k] /= factor[k];
  }
}

}  // namespace pyengine

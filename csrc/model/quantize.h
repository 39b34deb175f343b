// What is done to a layer norm and the dense layer after it before that layer is quantised.
#pragma once

#include <cstdint>

#include "ops/ops.h"

namespace pyengine {

// The layer norm's output and the weights' rows share the range of each channel k between them: the
// rows are to be multiplied by factor[k], and gain[k] and bias[k] are divided by it, which leaves
// the function as it was. With a[k] = sqrt(gain^2 + bias^2), the size of the channel,
//   factor[k] = sqrt(a[k] / rms(w[k])),
// so that both end up as large as the square root of what they contribute together. A channel whose
// gain is large and whose weights are small by the same number then is like any other.
//   w (K, N) in_out, any float dtype; gain, bias, factor (K,)
void equalize(ExecContext& ctx, const ops::Weight& w, float* gain, float* bias, float* factor);

}  // namespace pyengine

// Layer norm of one row by one warp: everywhere the same order of sums.
#pragma once

#include "cuda/kernels.h"
#include "cuda/types.h"

namespace pyengine::cuda {

// Goes over the row three times: mean, variance, result; the second and third time it comes from
// the cache next to the multiprocessor. Calls store(c, v): v are the values of channels [c, c + 8).
template <class Store>
__device__ inline void normalise_row(const float* row, int channels, const Norm& norm, int lane,
                                     Store&& store) {
  float sum = 0;
  for (int c = lane * 8; c < channels; c += 256) {
    float v[8];
    load8(row + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i];
  }
  const float mean = warp_sum(sum) / static_cast<float>(channels);
  float squares = 0;
  for (int c = lane * 8; c < channels; c += 256) {
    float v[8];
    load8(row + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += (v[i] - mean) * (v[i] - mean);
  }
  const float variance = warp_sum(squares) / static_cast<float>(channels);
  const float inverse = 1.0f / sqrtf(variance + norm.eps);
  for (int c = lane * 8; c < channels; c += 256) {
    float v[8], g[8], b[8];
    load8(row + c, v);
    load8(norm.gain + c, g);
    load8(norm.bias + c, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = (v[i] - mean) * inverse * g[i] + b[i];
    store(c, v);
  }
}

}  // namespace pyengine::cuda

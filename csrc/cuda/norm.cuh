// Layer norm of one row by one warp: everywhere the same order of sums.
#pragma once

#include "cuda/kernels.h"
#include "cuda/types.h"

namespace pyengine::cuda {

// How many vectors of 8 channels each lane has, if the row is to stay in registers.
__host__ __device__ constexpr int norm_vectors(int channels) { return (channels + 255) / 256; }

// Calls store(c, v): v are the values of channels [c, c + 8). The row is read at once and kept in
// registers, as its memory is slow to answer; one that has more than kVectors
// per lane is read again for the mean, the variance and the result.
template <int kVectors, class Store>
__device__ inline void normalise_row(const float* row, int channels, const Norm& norm, int lane,
                                     Store&& store) {
  constexpr int kKept = kVectors * 256;  // channels
  float v[kVectors][8];
  auto load = [&](int c0) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = c0 + i * 256 + lane * 8;
      if (c < channels) load8(row + c, v[i]);
    }
  };
  // f(c, v) for all channels of this lane, eight at a time
  auto over_row = [&](auto&& f) {
    for (int c0 = 0; c0 < channels; c0 += kKept) {
      if (channels > kKept) load(c0);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int c = c0 + i * 256 + lane * 8;
        if (c < channels) f(c, v[i]);
      }
    }
  };
  if (channels <= kKept) load(0);
  float sum = 0;
  over_row([&](int, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i];
  });
  const float mean = warp_sum(sum) / static_cast<float>(channels);
  float squares = 0;
  over_row([&](int, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
  });
  const float variance = warp_sum(squares) / static_cast<float>(channels);
  const float inverse = 1.0f / sqrtf(variance + norm.eps);
  over_row([&](int c, const float (&x)[8]) {
    float g[8], b[8], y[8];
    load8(norm.gain + c, g);
    load8(norm.bias + c, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = (x[i] - mean) * inverse * g[i] + b[i];
    store(c, y);
  });
}

// Before the row is there: what the norm reads besides.
__device__ inline void prefetch_norm(const Norm& norm, int channels, int thread, int threads) {
  for (int c = thread * 32; c < channels; c += threads * 32) {
    prefetch(norm.gain + c);
    prefetch(norm.bias + c);
  }
}

}  // namespace pyengine::cuda

// What the dense layers' kernels share: how an output is finished.
#pragma once

#include "cuda/kernels.h"
#include "cuda/types.h"

namespace pyengine::cuda {

__device__ inline float activate(float x, ops::Activation activation) {
  switch (activation) {
    case ops::Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    case ops::Activation::gelu_erf:
      return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
    case ops::Activation::relu:
      return x > 0.0f ? x : 0.0f;
    case ops::Activation::silu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

template <class T>
struct Epilogue {
  const float* bias;  // (N,) or null
  ops::Activation activation;
  Output output;
  void* out;  // (R, N)
  int64_t n;

  __device__ void store(int64_t row, int64_t column, float sum) const {
    float y = bias != nullptr ? sum + bias[column] : sum;
    y = activate(y, activation);
    const int64_t i = row * n + column;
    if (output == Output::act) {
      static_cast<T*>(out)[i] = narrowed<T>(y);
    } else if (output == Output::f32) {
      static_cast<float*>(out)[i] = y;
    } else {
      static_cast<float*>(out)[i] += y;
    }
  }
};

}  // namespace pyengine::cuda

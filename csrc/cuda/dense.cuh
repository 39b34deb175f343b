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
  int64_t n;
  DenseResult result;

  __device__ float bias_of(int64_t column) const { return bias != nullptr ? bias[column] : 0.0f; }

  Epilogue(const Dense& layer, const DenseResult& result)
      : bias(layer.bias), n(layer.n), result(result) {}

  __device__ void store(int64_t row, int64_t column, float sum) const {
    finish(row, column, sum + bias_of(column));
  }

  // The sum with its bias.
  __device__ void finish(int64_t row, int64_t column, float y) const {
    y = activate(y, result.activation);
    const int64_t i = row * n + column;
    switch (result.output) {
      case Output::act:
        static_cast<T*>(result.out)[i] = narrowed<T>(y);
        break;
      case Output::f32:
        static_cast<float*>(result.out)[i] = y;
        break;
      case Output::add:
        static_cast<float*>(result.out)[i] += y;
        break;
      case Output::qkv:
        store_qkv(row, static_cast<int>(column), narrowed<T>(y));
        break;
    }
  }

  // Those of rows from `row` on, below `end`. What is added to is read before anything is written,
  // so that these reads do not wait for each other.
  template <int count>
  __device__ void finish_rows(int64_t row, int64_t end, int64_t column,
                              const float (&ys)[count]) const {
    if (result.output != Output::add) {
#pragma unroll
      for (int r = 0; r < count; ++r) {
        if (row + r < end) finish(row + r, column, ys[r]);
      }
      return;
    }
    float* const to = static_cast<float*>(result.out) + row * n + column;
    float sums[count];
#pragma unroll
    for (int r = 0; r < count; ++r) {
      if (row + r < end) sums[r] = to[r * n] + activate(ys[r], result.activation);
    }
#pragma unroll
    for (int r = 0; r < count; ++r) {
      if (row + r < end) to[r * n] = sums[r];
    }
  }

  __device__ void store_qkv(int64_t row, int column, T y) const {
    const Tokens& tokens = result.tokens;
    const KVLayer& cache = result.cache;
    const int channels = cache.n_head * cache.head_dim;
    if (column < channels) {
      static_cast<T*>(result.out)[row * n + column] = y;
      return;
    }
    const bool is_value = column >= 2 * channels;
    const int channel = column - (is_value ? 2 * channels : channels);
    const int head = channel / cache.head_dim;
    const int64_t row_of_cache = row_of_slot(tokens.slots[row], cache.n_head, head);
    T* const to = static_cast<T*>(is_value ? cache.values : cache.keys);
    to[row_of_cache * cache.head_dim + channel - head * cache.head_dim] = y;
  }
};

// Up to kFewRows rows of f16 or bf16; of layer_norm(x) if `norm` is not null, for which x is f32
// with at most kNormedRows rows of kNormedChannels, and `layer` is not wide. A wide layer (the
// head) is cut otherwise. csrc/cuda/dense_rows.cu
// A norm of longer rows is faster by itself: in registers it would leave no room for other blocks.
constexpr int kNormedRows = 8, kNormedChannels = 1024, kWide = 8192;
template <class T>
void dense_rows(Stream& stream, const void* x, const Norm* norm, int num_rows, const Dense& layer,
                const Epilogue<T>& epilogue);

// Any number of rows and quantised weights. csrc/cuda/dense_quantized.cu
template <class T>
void dense_quantized(Stream& stream, const T* x, int num_rows, const QuantizedMatrix& w,
                     const Epilogue<T>& epilogue);

}  // namespace pyengine::cuda

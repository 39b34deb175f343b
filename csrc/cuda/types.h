// From a DType to the C++ type of a kernel.
#pragma once

#include "core/dtype.h"
#include "core/errors.h"
#include "cuda/device.h"
#include "kv/layout.h"

namespace pyengine::cuda {

template <class T>
struct Tag {
  using type = T;
};

// f(Tag<T>()) with the type of activations.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>());
    case DType::f16:
      return f(Tag<f16>());
    case DType::bf16:
      return f(Tag<bf16>());
    default:
      throw InternalError("no activations are int8");
  }
}

// Which row of head_dim values (and which scale) of a layer's cache a slot has for a head.
__device__ inline int64_t row_of_slot(int slot, int n_head, int head) {
  return (int64_t{slot / kBlockTokens} * n_head + head) * kBlockTokens + slot % kBlockTokens;
}

inline unsigned blocks_of(int64_t n, int64_t size) {
  return static_cast<unsigned>((n + size - 1) / size);
}

}  // namespace pyengine::cuda

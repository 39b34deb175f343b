// Element types of weights, activations and the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyengine {

enum class DType : uint8_t { f32, bf16, f16 };

constexpr size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

constexpr const char* name_of(DType t) {
  return t == DType::f32 ? "float32" : t == DType::bf16 ? "bfloat16" : "float16";
}

}  // namespace pyengine

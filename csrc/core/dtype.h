// Element types of weights, activations and the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyengine {

enum class DType : uint8_t { f32, bf16, f16, i8 };

constexpr size_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2; }

constexpr const char* name_of(DType t) {
  return t == DType::f32    ? "float32"
         : t == DType::bf16 ? "bfloat16"
         : t == DType::f16  ? "float16"
                            : "int8";
}

}  // namespace pyengine

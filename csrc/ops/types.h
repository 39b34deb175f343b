// The plain types and constants of ops.h: nothing that leaves code behind, so that files compiled
// for one instruction set may include them (csrc/cpu/kernels.h).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pyengine::ops {

constexpr int kReductionBlock = 256;  // k's of one chain; as accurate as PyTorch's blocked sums
constexpr int kKeySegment = 256;      // keys that attention weighs against one maximum: 16 blocks

enum class Activation : uint8_t {
  none,
  gelu_tanh,  // gelu_new, gelu_pytorch_tanh, gelu_fast: 0.5x(1 + tanh(sqrt(2/pi)(x + 0.044715x^3)))
  gelu_erf,   // gelu: 0.5x(1 + erf(x / sqrt 2))
  relu,
  silu,
};

enum class WeightLayout : uint8_t {
  in_out,  // (K, N), N contiguous: Conv1D as Hugging Face stores it
  out_in,  // (N, K), K contiguous: the output head, tied to the token embedding or not
  // Tiles of 16 columns, each with all of K contiguous, in 32-bit words: a cache line is 16 columns
  // of one word of k. N is padded to whole tiles and K to whole words, with zeros. The same for
  // every instruction set.
  //   f32   [N / 16][K][16]        one k per word
  //   bf16  [N / 16][K / 2][16][2]  k, k + 1: 16 lines are an AMX tile of 32 k's
  packed,
};

constexpr int64_t kTileColumns = 16;  // of WeightLayout::packed

// 32-bit words of one column of packed weights, and of the whole matrix.
constexpr int64_t packed_column_words(DType dtype, int64_t in_features) {
  return dtype == DType::f32 ? in_features : (in_features + 1) / 2;
}
constexpr int64_t packed_words(DType dtype, int64_t in_features, int64_t out_features) {
  return (out_features + kTileColumns - 1) / kTileColumns * kTileColumns *
         packed_column_words(dtype, in_features);
}

// The order in which tokens are preferred: higher logit, then lower id.
constexpr bool better(float logit_a, int32_t id_a, float logit_b, int32_t id_b) {
  return logit_a > logit_b || (logit_a == logit_b && id_a < id_b);
}

}  // namespace pyengine::ops

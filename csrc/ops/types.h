// The plain types and constants of ops.h: nothing that leaves code behind, so that files compiled
// for one instruction set may include them (csrc/cpu/kernels.h).
#pragma once

#include <cstdint>

#include "core/both.h"
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
  //   i8    [N / 16][K / 4][16][4]  k to k + 3 as unsigned bytes, 128 + weight; K padded to whole
  //         kQuantPads: 16 lines are an AMX tile of 64 k's
  packed,
  // The same for i8 weights that are m (nibble - z) with m and z of their group, kNibbleGroup k's
  // of a column:
  //   nibbles  [N / 16][K / 8][16][4]  low nibbles k to k + 3, high nibbles k + 4 to k + 7
  //   groups   [N / 16][K / 32][16]    m + 16 z
  packed_nibbles,
};

constexpr int64_t kLogitBlock = 64;   // logits that share a maximum (ops::head)
constexpr int64_t kTileColumns = 16;  // of WeightLayout::packed
constexpr int64_t kQuantPad = 64;     // k's that i8 weights are padded to
constexpr int64_t kNibbleGroup = 32;  // k's that share a multiplier and a zero point
constexpr int64_t kInputGroup = 256;  // k's of a quantised input row that share a scale

// A quantized row of K inputs, as dense layers of i8 weights read it: K padded to kQuantPad bytes,
// then for each kInputGroup k's the scale (f32), then for each -128 times the sum of its integers
// (i32), rounded up to cache lines.
constexpr int64_t quantized_row_words(int64_t in_features) {
  const int64_t padded = (in_features + kQuantPad - 1) / kQuantPad * kQuantPad;
  const int64_t groups = (in_features + kInputGroup - 1) / kInputGroup;
  return (padded + groups * 8 + 63) / 64 * 16;
}

// Bytes of i8 weights, of weights in nibbles, and of their groups.
constexpr int64_t padded_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t int8_bytes(int64_t in_features, int64_t out_features) {
  return padded_to(in_features, kQuantPad) * padded_to(out_features, kTileColumns);
}
constexpr int64_t nibble_bytes(int64_t in_features, int64_t out_features) {
  return int8_bytes(in_features, out_features) / 2;
}
constexpr int64_t group_bytes(int64_t in_features, int64_t out_features) {
  return int8_bytes(in_features, out_features) / kNibbleGroup;
}

// 32-bit words of one column of packed weights, and of the whole matrix.
constexpr int64_t packed_column_words(DType dtype, int64_t in_features) {
  return dtype == DType::f32 ? in_features : (in_features + 1) / 2;
}
constexpr int64_t packed_words(DType dtype, int64_t in_features, int64_t out_features) {
  return (out_features + kTileColumns - 1) / kTileColumns * kTileColumns *
         packed_column_words(dtype, in_features);
}

constexpr int kSumThresholds = 4;  // of sums_above

// The order in which tokens are preferred: higher logit, then lower id.
PYENGINE_BOTH constexpr bool better(float logit_a, int32_t id_a, float logit_b, int32_t id_b) {
  return logit_a > logit_b || (logit_a == logit_b && id_a < id_b);
}

}  // namespace pyengine::ops

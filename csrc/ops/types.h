// The plain types and constants of ops.h: nothing that leaves code behind, so that files compiled
// for one instruction set may include them (csrc/cpu/kernels.h).
#pragma once

#include <cstdint>

namespace pyengine::ops {

constexpr int kReductionBlock = 256;  // k's of one chain; as accurate as PyTorch's blocked sums
constexpr int kKeyTile = 64;          // keys of one attention tile: 4 KV blocks

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
};

// The order in which tokens are preferred: higher logit, then lower id.
constexpr bool better(float logit_a, int32_t id_a, float logit_b, int32_t id_b) {
  return logit_a > logit_b || (logit_a == logit_b && id_a < id_b);
}

}  // namespace pyengine::ops

// How one layer's keys and values lie in memory: blocks of 16 tokens, shared by the CPU kernels
// that write and read them and by the storage that allocates them.
//
// A block holds 16 tokens of every head, keys before values:
//
//   keys    f32   [n_head][head_dim][16]          lanes are tokens: q.k needs no horizontal sum
//           bf16  [n_head][head_dim_k / 2][16][2] pairs of neighbouring channels in one 32-bit word
//   values  any   [n_head][16][head_dim_v]        lanes are channels
//
// head_dim_k is head_dim rounded up to even, head_dim_v rounded up to 16 (one 512-bit float
// vector). Padding lanes are never stored to an output, so what they hold does not matter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace pyengine {

constexpr int kBlockTokens = 16;
constexpr int kMaxHeadDim = 256;  // channels of a head: attention keeps its sums on the stack

struct KVLayout {
  DType dtype = DType::f32;  // f32 or bf16
  int32_t n_head = 0;
  int32_t head_dim = 0;

  int64_t head_dim_k() const { return (head_dim + 1) / 2 * 2; }
  int64_t head_dim_v() const { return (head_dim + 15) / 16 * 16; }
  int64_t key_elements() const { return n_head * head_dim_k() * kBlockTokens; }
  int64_t value_elements() const { return n_head * head_dim_v() * kBlockTokens; }
  int64_t block_elements() const { return key_elements() + value_elements(); }
  size_t block_bytes() const { return block_elements() * size_of(dtype); }
};

// One layer of the cache: `data` holds num_blocks consecutive blocks of `layout`.
struct KVLayerView {
  KVLayout layout;
  void* data = nullptr;
  int32_t num_blocks = 0;
};

}  // namespace pyengine

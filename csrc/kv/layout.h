// How one layer's keys and values lie in memory: blocks of 16 tokens, shared by the CPU kernels
// that write and read them and by the storage that allocates them.
//
// A block holds 16 tokens of every head, the keys of all heads before the values of all heads:
//
//   keys    f32   [n_head][head_dim][16]          lanes are tokens: q.k needs no horizontal sum
//           bf16  [n_head][head_dim_k / 2][16][2] a 32-bit word is a pair of neighbouring channels
//           i8    [n_head] of f32 [16] scales, then [head_dim_k / 4][16][4]: a word is four
//           channels
//   values  f32   [n_head][16][head_dim_v]        lanes are channels
//           bf16  [n_head][8][head_dim_v][2]      a word is one channel of two neighbouring tokens
//           i8    [n_head] of f32 [16] scales, then [4][head_dim_v][4]: a word is four tokens
//
// The pairs of bf16 and the fours of i8 are what dot products of pairs and fours and AMX tiles
// read. An i8 byte is 128 + i, and stands for i times the scale of its token and head.
//
// head_dim_k is head_dim rounded up to whole words; the channels that this may add are zero in
// every token that was written. head_dim_v is head_dim rounded up to 16 (one 512-bit float vector);
// what its padding holds does not matter, since it never reaches an output.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace pyengine {

constexpr int kBlockTokens = 16;
constexpr int kMaxHeadDim = 256;  // channels of a head: attention keeps its sums in cache

struct KVLayout {
  DType dtype = DType::f32;  // f32, bf16 or i8
  int32_t n_head = 0;
  int32_t head_dim = 0;

  int64_t head_dim_k() const {
    const int64_t per_word = 4 / static_cast<int64_t>(size_of(dtype));
    return (head_dim + per_word - 1) / per_word * per_word;
  }
  int64_t head_dim_v() const { return (head_dim + 15) / 16 * 16; }
  int64_t scale_bytes() const { return dtype == DType::i8 ? kBlockTokens * 4 : 0; }
  // Bytes of one head in a block.
  int64_t key_bytes() const {
    return scale_bytes() + kBlockTokens * head_dim_k() * static_cast<int64_t>(size_of(dtype));
  }
  int64_t value_bytes() const {
    return scale_bytes() + kBlockTokens * head_dim_v() * static_cast<int64_t>(size_of(dtype));
  }
  // Where in a block the values begin.
  int64_t values_at() const { return n_head * key_bytes(); }
  size_t block_bytes() const { return static_cast<size_t>(n_head * (key_bytes() + value_bytes())); }
};

// One layer of the cache: `data` holds num_blocks consecutive blocks of `layout`.
struct KVLayerView {
  KVLayout layout;
  void* data = nullptr;
  int32_t num_blocks = 0;
};

}  // namespace pyengine

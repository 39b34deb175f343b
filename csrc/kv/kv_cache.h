// Storage of keys and values on the CPU: (n_layer, num_blocks) blocks of KVLayout.
#pragma once

#include <cstdint>

#include "core/memory.h"
#include "kv/layout.h"

namespace pyengine {

class KVCache {
 public:
  // Throws ConfigError for sizes below 1, a head_dim above kMaxHeadDim or a dtype other than f32,
  // bf16 and i8, OutOfMemory if the address space does not suffice. Memory is used from the moment
  // a block is first written.
  KVCache(int32_t n_layer, const KVLayout& layout, int32_t num_blocks);

  int32_t n_layer() const { return n_layer_; }
  int32_t num_blocks() const { return num_blocks_; }
  const KVLayout& layout() const { return layout_; }
  size_t block_bytes() const { return bytes_per_block(n_layer_, layout_); }  // over all layers
  KVLayerView layer(int32_t i) const;

  static size_t bytes_per_block(int32_t n_layer, const KVLayout& layout) {
    return static_cast<size_t>(n_layer) * layout.block_bytes();
  }

 private:
  int32_t n_layer_;
  int32_t num_blocks_;
  KVLayout layout_;
  size_t layer_bytes_;  // rounded up to a cache line
  LazyMapping memory_;
};

}  // namespace pyengine

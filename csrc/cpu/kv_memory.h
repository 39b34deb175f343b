// From a view of the KV cache to what the kernels take.
#pragma once

#include "cpu/kernels.h"

namespace pyengine::cpu {

inline KVMemory kv_memory(const KVLayerView& cache) {
  const KVLayout& layout = cache.layout;
  KVMemory kv;
  kv.data = static_cast<char*>(cache.data);
  kv.dtype = layout.dtype;
  kv.block_bytes = static_cast<int64_t>(layout.block_bytes());
  kv.key_bytes = layout.key_bytes();
  kv.value_bytes = layout.value_bytes();
  kv.values_at = layout.values_at();
  kv.n_head = layout.n_head;
  kv.head_dim = layout.head_dim;
  kv.head_dim_v = layout.head_dim_v();
  return kv;
}

}  // namespace pyengine::cpu

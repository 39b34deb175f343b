#include "kv/kv_cache.h"

#include <string>

#include "core/errors.h"

namespace pyengine {

namespace {

void require_positive(const char* name, int64_t value) {
  if (value < 1) {
    throw ConfigError(std::string("KV cache: ") + name + " is " + std::to_string(value) +
                      ", but must be at least 1");
  }
}

}  // namespace

KVCache::KVCache(int32_t n_layer, const KVLayout& layout, int32_t num_blocks)
    : n_layer_(n_layer), num_blocks_(num_blocks), layout_(layout) {
  require_positive("n_layer", n_layer);
  require_positive("n_head", layout.n_head);
  require_positive("head_dim", layout.head_dim);
  if (layout.head_dim > kMaxHeadDim) {
    throw ConfigError("KV cache: head_dim is " + std::to_string(layout.head_dim) +
                      ", but must be at most " + std::to_string(kMaxHeadDim));
  }
  require_positive("num_blocks", num_blocks);
  if (layout.dtype == DType::f16) {
    throw ConfigError("KV cache: the dtype is float16, but must be float32, bfloat16 or int8");
  }
  layer_bytes_ = (layout.block_bytes() * num_blocks + 63) / 64 * 64;
  // Pages of 4 KB on purpose: with huge pages a request of one block would touch 2 MB in every
  // layer.
  memory_ = LazyMapping(layer_bytes_ * n_layer);
}

KVLayerView KVCache::layer(int32_t i) const {
  return {layout_, memory_.bytes() + layer_bytes_ * i, num_blocks_};
}

}  // namespace pyengine

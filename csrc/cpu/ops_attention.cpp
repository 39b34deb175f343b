// attention and copy_blocks of ops.h.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/errors.h"
#include "cpu/kernels.h"
#include "ops/ops.h"

namespace pyengine::ops {

void attention(ExecContext& ctx, const float* q, const RaggedBatch& batch, const KVLayerView& cache,
               float scale, void* out, DType out_dtype) {
  const KVLayout& layout = cache.layout;
  if (layout.head_dim > kMaxHeadDim) {
    throw ConfigError("attention: head_dim is " + std::to_string(layout.head_dim) +
                      ", but must be at most " + std::to_string(kMaxHeadDim));
  }
  cpu::AttentionJob job;
  job.q = q;
  job.positions = batch.positions;
  job.kv = cache.data;
  job.kv_bf16 = layout.dtype == DType::bf16;
  job.kv_block_elements = layout.block_elements();
  job.kv_key_elements = layout.key_elements();
  job.channels = static_cast<int64_t>(layout.n_head) * layout.head_dim;
  job.head_dim = layout.head_dim;
  job.head_dim_k = layout.head_dim_k();
  job.head_dim_v = layout.head_dim_v();
  job.scale = scale;
  job.out = out;
  job.out_bf16 = out_dtype == DType::bf16;

  // One item is a head and a tile of one sequence's rows.
  const int64_t tile_rows = ctx.kernels.attention_rows;
  ArenaScope scope(ctx.arena);
  int64_t* first_item = ctx.arena.take<int64_t>(batch.num_seqs + 1);
  first_item[0] = 0;
  for (int32_t b = 0; b < batch.num_seqs; ++b) {
    const int64_t rows = batch.query_start[b + 1] - batch.query_start[b];
    first_item[b + 1] = first_item[b] + (rows + tile_rows - 1) / tile_rows * layout.n_head;
  }
  ctx.pool.parallel_for(first_item[batch.num_seqs], [&](int64_t item, int) {
    const int64_t b =
        std::upper_bound(first_item, first_item + batch.num_seqs + 1, item) - first_item - 1;
    // Heads outermost: neighbours share keys and values. Last rows, which see most keys, first.
    const int64_t tiles = (first_item[b + 1] - first_item[b]) / layout.n_head;
    const int64_t head = (item - first_item[b]) / tiles;
    const int64_t tile = tiles - 1 - (item - first_item[b]) % tiles;
    const int64_t token0 = batch.query_start[b] + tile * tile_rows;
    const int64_t rows = std::min<int64_t>(tile_rows, batch.query_start[b + 1] - token0);
    ctx.kernels.attention(job, batch.block_table + b * batch.max_blocks, head, token0,
                          static_cast<int>(rows));
  });
}

void copy_blocks(ExecContext& ctx, const KVLayerView& cache, const int32_t* pairs, int64_t n) {
  const size_t bytes = cache.layout.block_bytes();
  char* data = static_cast<char*>(cache.data);
  ctx.pool.parallel_for(n, [&](int64_t i, int) {
    std::memcpy(data + pairs[2 * i + 1] * bytes, data + pairs[2 * i] * bytes, bytes);
  });
}

}  // namespace pyengine::ops

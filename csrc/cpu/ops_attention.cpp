// attention and copy_blocks of ops.h.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/errors.h"
#include "cpu/kernels.h"
#include "cpu/kv_memory.h"
#include "ops/ops.h"

namespace pyengine::cpu {
namespace {

constexpr int kMaxUnits = 48;  // heads times rows of an item: its state stays in cache

const AttentionKernels& attention_kernels(const Kernels& kernels, DType kv_dtype) {
  if (kv_dtype == DType::f32) return kernels.attention_f32;
  if (kv_dtype == DType::bf16) return kernels.attention_bf16;
  if (kv_dtype == DType::i8) return kernels.attention_i8;
  throw InternalError(std::string("attention reads float32, bfloat16 or int8, not ") +
                      name_of(kv_dtype));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a batch is cut into items: over sequences, tiles of rows and heads; over segments of keys
// too where that would leave threads without work.
struct AttentionCut {
  AttentionItem* items = nullptr;  // in order of running; without segments
  int64_t num_items = 0;
  bool by_segment = false;
};

int segments_of(const AttentionJob& job, const AttentionItem& item) {
  return job.positions[item.row0 + item.num_rows - 1] / ops::kKeySegment + 1;
}

AttentionCut cut_attention(ExecContext& ctx, const AttentionJob& job, const ops::RaggedBatch& batch,
                           const AttentionKernels& kernels) {
  const int threads = ctx.pool.num_threads();
  const auto n_head = static_cast<int>(job.kv.n_head);
  int64_t tiles = 0;
  for (int32_t b = 0; b < batch.num_seqs; ++b) {
    tiles += ceil_div(batch.query_start[b + 1] - batch.query_start[b], kernels.max_rows);
  }
  AttentionCut cut;
  cut.items = ctx.arena.take<AttentionItem>(tiles * n_head);
  // Several heads in an item read a block in one run, as long as there are two items for everybody:
  // one sequence of 1,000 tokens takes a quarter less time with three heads than with one.
  const int64_t shared = std::max<int64_t>(tiles * n_head / (2 * threads), 1);
  int max_segments = 1;
  for (int32_t b = 0; b < batch.num_seqs; ++b) {
    const int64_t begin = batch.query_start[b], end = batch.query_start[b + 1];
    if (begin == end) continue;
    const int64_t num_tiles = ceil_div(end - begin, kernels.max_rows);
    const int64_t widest = std::min<int64_t>(end - begin, kernels.max_rows);
    int64_t heads = end - begin > kernels.max_shared ? 1 : std::min(shared, kMaxUnits / widest);
    heads = ceil_div(n_head, ceil_div(n_head, std::max<int64_t>(heads, 1)));
    // Heads outermost: neighbours share keys and values. Last rows, which see most keys, first.
    for (int head = 0; head < n_head; head += static_cast<int>(heads)) {
      for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
        AttentionItem item;
        item.block_table = batch.block_table + static_cast<int64_t>(b) * batch.max_blocks;
        item.row0 = begin + tile * kernels.max_rows;
        item.num_rows = static_cast<int>(std::min<int64_t>(kernels.max_rows, end - item.row0));
        item.head0 = head;
        item.num_heads = std::min(n_head - head, static_cast<int>(heads));
        cut.items[cut.num_items++] = item;
        max_segments = std::max(max_segments, segments_of(job, item));
      }
    }
  }
  for (int64_t i = 0; i + threads < cut.num_items; ++i) cut.items[i].next = &cut.items[i + threads];
  cut.by_segment = cut.num_items < 2 * threads && max_segments > 1 && threads > 1;
  return cut;
}

// Scratch floats that any of the items needs.
int64_t item_scratch(const AttentionJob& job, const AttentionCut& cut,
                     const AttentionKernels& kernels) {
  int64_t most = 0;
  int rows = 0, heads = 0;
  for (int64_t i = 0; i < cut.num_items; ++i) {
    const AttentionItem& item = cut.items[i];
    if (item.num_rows == rows && item.num_heads == heads) continue;
    rows = item.num_rows;
    heads = item.num_heads;
    most = std::max(most, kernels.scratch_floats(job, rows, heads));
  }
  return ceil_div(most, 16) * 16;
}

// One work item for each segment of each item, then the merging of each item's segments.
void run_by_segment(ExecContext& ctx, const AttentionJob& job, const AttentionCut& cut,
                    const AttentionKernels& kernels, float* scratch, int64_t scratch_stride) {
  int64_t* first = ctx.arena.take<int64_t>(cut.num_items + 1);
  int64_t* first_float = ctx.arena.take<int64_t>(cut.num_items + 1);
  auto part_size = [&](const AttentionItem& item) {
    return int64_t{item.num_rows} * item.num_heads * kernels.part_floats(job);
  };
  first[0] = first_float[0] = 0;
  for (int64_t i = 0; i < cut.num_items; ++i) {
    const int segments = segments_of(job, cut.items[i]);
    first[i + 1] = first[i] + segments;
    first_float[i + 1] = first_float[i] + segments * part_size(cut.items[i]);
  }
  float* partials = ctx.arena.take<float>(first_float[cut.num_items]);
  ctx.pool.parallel_for(first[cut.num_items], [&](int64_t n, int worker) {
    const int64_t i = std::upper_bound(first, first + cut.num_items + 1, n) - first - 1;
    AttentionItem item = cut.items[i];
    item.segment = static_cast<int>(n - first[i]);
    item.next = nullptr;
    item.partials = partials + first_float[i] + item.segment * part_size(item);
    kernels.run(job, item, scratch + worker * scratch_stride);
  });
  ctx.pool.parallel_for(cut.num_items, [&](int64_t i, int worker) {
    const AttentionItem& item = cut.items[i];
    kernels.merge(job, item, partials + first_float[i], part_size(item), segments_of(job, item),
                  scratch + worker * scratch_stride);
  });
}

}  // namespace
}  // namespace pyengine::cpu

namespace pyengine::ops {

void attention(ExecContext& ctx, const float* q, const RaggedBatch& batch, const KVLayerView& cache,
               float scale, void* out, DType out_dtype) {
  const KVLayout& layout = cache.layout;
  if (layout.head_dim > kMaxHeadDim) {
    throw ConfigError("attention: head_dim is " + std::to_string(layout.head_dim) +
                      ", but must be at most " + std::to_string(kMaxHeadDim));
  }
  constexpr float kLog2E = 1.44269504f;
  cpu::AttentionJob job;
  job.q = q;
  job.positions = batch.positions;
  job.kv = cpu::kv_memory(cache);
  job.channels = static_cast<int64_t>(layout.n_head) * layout.head_dim;
  job.scale = scale * kLog2E;
  job.out = out;
  job.out_bf16 = out_dtype == DType::bf16;

  const cpu::AttentionKernels& kernels = cpu::attention_kernels(ctx.kernels, layout.dtype);
  ArenaScope scope(ctx.arena);
  const cpu::AttentionCut cut = cpu::cut_attention(ctx, job, batch, kernels);
  const int64_t stride = cpu::item_scratch(job, cut, kernels);
  float* scratch = ctx.arena.take<float>(stride * ctx.pool.num_threads());
  if (cut.by_segment) {
    return cpu::run_by_segment(ctx, job, cut, kernels, scratch, stride);
  }
  ctx.pool.parallel_for(cut.num_items, [&](int64_t i, int worker) {
    kernels.run(job, cut.items[i], scratch + worker * stride);
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

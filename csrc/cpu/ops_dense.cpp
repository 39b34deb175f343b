// linear, linear_residual, qkv and query of ops.h.
#include <algorithm>
#include <numeric>

#include "core/errors.h"
#include "cpu/dense_items.h"
#include "cpu/kv_memory.h"

namespace pyengine::cpu {
namespace {

constexpr int64_t kMaxItemRows = 512;  // their sums stay in a 2 MB L2 beside the packed weights
constexpr int64_t kPrepareRows = 16;
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kPackColumns = 192;
constexpr int64_t kPackInputs =
    256;  // k's that are converted before they are packed, if they must be

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What an item's columns are a multiple of.
int64_t item_unit(const DenseJob& job, const DenseKernels& kernels) {
  // Outputs that are quantized belong to groups of the next layer's inputs.
  if (job.store == Store::quantized) return ops::kInputGroup;
  if (job.block_max != nullptr) return std::lcm(kernels.panel_columns, ops::kLogitBlock);
  // The scale of a head in an i8 cache is known once all of its channels are.
  const bool whole_heads = job.store == Store::qkv && job.kv.dtype == DType::i8;
  return whole_heads ? std::lcm(kernels.panel_columns, job.kv.head_dim) : kernels.panel_columns;
}

// Columns [first_col, end_col); first_col is a multiple of item_unit.
void run_columns(ExecContext& ctx, const DenseJob& job, int64_t rows, const DenseKernels& kernels,
                 int64_t first_col, int64_t end_col) {
  const DenseItems items = cut_dense(item_unit(job, kernels), rows, end_col - first_col,
                                     kMaxItemRows, ctx.pool.num_threads());
  const int64_t size =
      round_up(kernels.scratch_floats(job.in_features, items.rows, items.cols), 16);
  float* scratch = ctx.arena.take<float>(size * ctx.pool.num_threads());
  ctx.pool.parallel_for(items.count(), [&](int64_t i, int worker) {
    kernels.run(job, items.row0(i), items.row1(i), first_col + items.col0(i),
                first_col + items.col1(i), scratch + worker * size);
  });
}

void run_items(ExecContext& ctx, const DenseJob& job, int64_t rows, const DenseKernels& kernels) {
  run_columns(ctx, job, rows, kernels, 0, job.out_features);
}

}  // namespace

int64_t DenseItems::row1(int64_t item) const { return std::min(row0(item) + rows, total_rows); }
int64_t DenseItems::col1(int64_t item) const { return std::min(col0(item) + cols, total_cols); }

DenseItems cut_dense(int64_t unit, int64_t rows, int64_t cols, int64_t max_rows, int threads) {
  DenseItems items;
  items.total_rows = rows;
  items.total_cols = cols;
  // Several items for each thread, so that none waits long for the last.
  const int64_t wanted = kItemsPerThread * threads;
  const int64_t widest =
      std::max((rows <= 64 ? kMaxItemColumns : kMaxItemColumns / 2) / unit * unit, unit);
  items.cols = std::min(round_up(ceil_div(cols, wanted), unit), widest);
  items.col_items = ceil_div(cols, items.cols);
  // Rows are cut further when columns alone do not occupy the threads; each part reads them all.
  int64_t parts = ceil_div(rows, max_rows);
  if (items.col_items < 2 * threads) {
    parts = std::max(parts, std::min(ceil_div(2 * threads, items.col_items), rows / 64));
  }
  items.rows = std::min(round_up(ceil_div(rows, std::max<int64_t>(parts, 1)), 8), rows);
  items.row_items = ceil_div(rows, items.rows);
  return items;
}

const DenseKernels& dense_kernels(const Kernels& kernels, const ops::Weight& w) {
  switch (w.dtype) {
    case DType::f32:
      return kernels.dense_f32;
    case DType::bf16:
      return kernels.dense_bf16;
    case DType::i8:
      if (w.layout == ops::WeightLayout::packed) return kernels.dense_int8;
      if (w.layout == ops::WeightLayout::packed_nibbles) return kernels.dense_int4;
      throw InternalError("dense layers read int8 weights in the packed layouts only");
    case DType::f16:
      break;
  }
  throw InternalError(std::string("dense layers do not take weights of ") + name_of(w.dtype));
}

DenseJob prepare_dense(ExecContext& ctx, const void* x, int64_t rows, const ops::Weight& w,
                       const float* bias) {
  const DenseKernels& kernels = dense_kernels(ctx.kernels, w);
  const bool quantized = w.dtype == DType::i8 && w.input == DType::i8;
  const DType act = w.dtype == DType::i8 ? DType::f32 : w.dtype;
  const int64_t row_bytes = w.in_features * static_cast<int64_t>(size_of(act));
  DenseJob job;
  job.x = x;
  job.x_stride = row_bytes / 4;
  job.w = w.data;
  job.w_scale = w.scale;
  job.w_group = w.group;
  job.layout = w.layout;
  job.in_features = w.in_features;
  job.out_features = w.out_features;
  job.bias = bias;
  const int64_t words = kernels.prepared_words(w.in_features);
  if (quantized) {
    job.x_stride = words;
  } else if (words > 0) {
    float* prepared = ctx.arena.take<float>(rows * words);
    ctx.pool.parallel_for(ceil_div(rows, kPrepareRows), [&](int64_t i, int) {
      const int64_t row = i * kPrepareRows;
      kernels.prepare(static_cast<const char*>(x) + row * row_bytes,
                      std::min(kPrepareRows, rows - row), w.in_features, prepared + row * words);
    });
    job.x = prepared;
    job.x_stride = words;
  }
  return job;
}

}  // namespace pyengine::cpu

namespace pyengine::ops {

void pack(ExecContext& ctx, const Weight& w, DType dtype, void* out) {
  Weight target;
  target.dtype = dtype;
  const cpu::DenseKernels& kernels = cpu::dense_kernels(ctx.kernels, target);
  const int64_t inputs = w.in_features, outputs = w.out_features;
  const int64_t words = packed_column_words(dtype, inputs);
  const int64_t inputs_per_word = dtype == DType::f32 ? 1 : 2;
  const int64_t tiled = cpu::round_up(outputs, kTileColumns);
  const bool is_in_out = w.layout == WeightLayout::in_out;
  ArenaScope scope(ctx.arena);
  const int64_t strip = w.dtype == dtype ? 0 : cpu::kPackColumns * cpu::kPackInputs;
  float* strips = ctx.arena.take<float>(strip * ctx.pool.num_threads());

  ctx.pool.parallel_for(cpu::ceil_div(tiled, cpu::kPackColumns), [&](int64_t item, int worker) {
    const int64_t col0 = item * cpu::kPackColumns;
    const int64_t cols = std::min(cpu::kPackColumns, tiled - col0);
    float* to = static_cast<float*>(out) + col0 * words;
    cpu::DenseJob job;
    job.layout = w.layout;
    job.in_features = inputs;
    job.out_features = outputs;
    if (w.dtype == dtype) {
      job.w = w.data;
      kernels.pack(job, 0, words, col0, cols, to, words);
      return;
    }
    const int64_t valid = std::min(cols, outputs - col0);
    job.w = strips + worker * strip;
    job.out_features = valid;
    for (int64_t k0 = 0; k0 < inputs; k0 += cpu::kPackInputs) {
      const int64_t count = std::min(cpu::kPackInputs, inputs - k0);
      const int64_t rows = is_in_out ? count : valid, row_size = is_in_out ? valid : count;
      job.in_features = count;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = is_in_out ? (k0 + r) * outputs + col0 : (col0 + r) * inputs + k0;
        ctx.kernels.convert(
            static_cast<const char*>(w.data) + from * static_cast<int64_t>(size_of(w.dtype)),
            w.dtype,
            reinterpret_cast<char*>(strips + worker * strip) +
                r * row_size * static_cast<int64_t>(size_of(dtype)),
            dtype, row_size);
      }
      kernels.pack(job, 0, cpu::ceil_div(count, inputs_per_word), 0, cols,
                   to + k0 / inputs_per_word * kTileColumns, words);
    }
  });
}

void linear(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w, const float* bias,
            Activation activation, void* out, DType out_dtype) {
  if (num_rows == 0) return;
  ArenaScope scope(ctx.arena);
  cpu::DenseJob job = cpu::prepare_dense(ctx, x, num_rows, w, bias);
  job.activation = activation;
  job.store = out_dtype == DType::bf16 ? cpu::Store::bf16
              : out_dtype == DType::i8 ? cpu::Store::quantized
                                       : cpu::Store::f32;
  job.out = out;
  job.out_stride = w.out_features;
  cpu::run_items(ctx, job, num_rows, cpu::dense_kernels(ctx.kernels, w));
}

void head(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& head, float* logits,
          float* block_max) {
  if (num_rows == 0) return;
  ArenaScope scope(ctx.arena);
  cpu::DenseJob job = cpu::prepare_dense(ctx, x, num_rows, head, nullptr);
  job.out = logits;
  job.out_stride = head.out_features;
  job.block_max = block_max;
  job.block_max_stride = cpu::ceil_div(head.out_features, kLogitBlock);
  cpu::run_items(ctx, job, num_rows, cpu::dense_kernels(ctx.kernels, head));
}

void linear_residual(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w,
                     const float* bias, float* residual) {
  if (num_rows == 0) return;
  ArenaScope scope(ctx.arena);
  cpu::DenseJob job = cpu::prepare_dense(ctx, x, num_rows, w, bias);
  job.store = cpu::Store::residual;
  job.out = residual;
  job.out_stride = w.out_features;
  cpu::run_items(ctx, job, num_rows, cpu::dense_kernels(ctx.kernels, w));
}

void qkv(ExecContext& ctx, const void* x, const Weight& w, const float* bias,
         const RaggedBatch& batch, float* q, const KVLayerView& cache) {
  if (batch.num_tokens == 0) return;
  ArenaScope scope(ctx.arena);
  int64_t* slots = ctx.arena.take<int64_t>(batch.num_tokens);
  for (int32_t b = 0; b < batch.num_seqs; ++b) {
    const int32_t* table = batch.block_table + static_cast<int64_t>(b) * batch.max_blocks;
    for (int32_t t = batch.query_start[b]; t < batch.query_start[b + 1]; ++t) {
      const int32_t p = batch.positions[t];
      slots[t] = static_cast<int64_t>(table[p / kBlockTokens]) * kBlockTokens + p % kBlockTokens;
    }
  }
  cpu::DenseJob job = cpu::prepare_dense(ctx, x, batch.num_tokens, w, bias);
  job.kv = cpu::kv_memory(cache);
  job.store = cpu::Store::qkv;
  const cpu::DenseKernels& kernels = cpu::dense_kernels(ctx.kernels, w);
  const int64_t channels = w.out_features / 3;
  const int64_t unit = cpu::item_unit(job, kernels);
  job.out = q;
  job.out_stride = channels;
  job.kv_slot = slots;
  const int64_t first_col = q != nullptr ? 0 : channels / unit * unit;
  cpu::run_columns(ctx, job, batch.num_tokens, kernels, first_col, w.out_features);
}

void query(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w, const float* bias,
           float* q) {
  if (num_rows == 0) return;
  ArenaScope scope(ctx.arena);
  cpu::DenseJob job = cpu::prepare_dense(ctx, x, num_rows, w, bias);
  const int64_t channels = w.out_features / 3;
  job.out = q;
  job.out_stride = channels;
  cpu::run_columns(ctx, job, num_rows, cpu::dense_kernels(ctx.kernels, w), 0, channels);
}

}  // namespace pyengine::ops

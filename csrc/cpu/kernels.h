// One table of functions per instruction set, and the plain structs they take. Included by files
// that are compiled for one instruction set, so nothing here may emit code of its own.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kv/layout.h"
#include "ops/types.h"

namespace pyengine::cpu {

using ops::kLogitBlock;
using ops::kSumThresholds;

// Columns of one work item of a dense layer at most, unless that cuts what must stay together; a
// multiple of every back end's panel width.
constexpr int64_t kMaxItemColumns = 384;

// What happens to x w + bias (after the activation).
enum class Store : uint8_t {
  f32,       // out[r][n] = y
  bf16,      // out[r][n] = y
  residual,  // out[r][n] += y, f32
  qkv,  // columns [0, C) to out[r][n] f32 (not null), [C, 2C) to keys and [2C, 3C) to values of the
        // cache
  quantized,  // out[r] = the quantized row (ops/types.h); of i8 weights only
};

// One layer of the KV cache (csrc/kv/layout.h), in bytes.
struct KVMemory {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t block_bytes = 0;
  int64_t key_bytes = 0, value_bytes = 0;  // of one head in a block
  int64_t values_at = 0;                   // where in a block the values begin
  int64_t n_head = 0, head_dim = 0, head_dim_v = 0;
};

// out = store(activation(x w + bias)); see ops.h for the order of the sums.
struct DenseJob {
  const void* x = nullptr;  // (R, K) f32, or what DenseKernels::prepare made of bf16 rows
  int64_t x_stride = 0;     // 32-bit words from row to row of x
  const void* w = nullptr;
  const float* w_scale = nullptr;  // i8 weights: ops::Weight
  const uint8_t* w_group = nullptr;
  ops::WeightLayout layout = ops::WeightLayout::in_out;
  int64_t in_features = 0;      // K
  int64_t out_features = 0;     // N
  const float* bias = nullptr;  // (N,) or null
  ops::Activation activation = ops::Activation::none;
  Store store = Store::f32;
  void* out = nullptr;
  int64_t out_stride = 0;  // elements from row to row of out
  int64_t out_row0 = 0;    // row and column of out[0]
  int64_t out_col0 = 0;
  // Store::f32 only, or null: as ops::head, items being whole blocks.
  float* block_max = nullptr;
  int64_t block_max_stride = 0;
  // Store::qkv only; an i8 cache needs items of whole heads:
  const int64_t* kv_slot = nullptr;  // (R,) physical block * 16 + slot within the block
  KVMemory kv;
};

struct DenseKernels {
  // 32-bit words that one prepared row of K inputs takes; 0: x is read as it lies.
  int64_t (*prepared_words)(int64_t in_features);
  // Rows of x (`in_features` elements each) to `prepared_words` words each.
  void (*prepare)(const void* x, int64_t rows, int64_t in_features, void* out);
  // Scratch floats that `run` needs for an item of that many rows and columns of K inputs.
  int64_t (*scratch_floats)(int64_t in_features, int64_t rows, int64_t cols);
  // Rows [row0, row1), columns [col0, col1).
  void (*run)(const DenseJob& job, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
              float* scratch);
  // Words [word0, word0 + words) of k of columns [col0, col0 + cols) of in_out or out_in weights to
  // the packed layout: dst has tile_words words of k for each tile. cols is whole tiles, zero
  // beyond the last column.
  void (*pack)(const DenseJob& job, int64_t word0, int64_t words, int64_t col0, int64_t cols,
               float* dst, int64_t tile_words);
  int64_t panel_columns;  // items start at multiples of this
};

// Tiles of columns of a matrix to integers; see ops::quantize.
struct QuantizeJob {
  const void* w = nullptr;
  DType dtype = DType::f32;
  bool is_in_out = true;
  int64_t in_features = 0;   // K
  int64_t out_features = 0;  // N
  const float* factor = nullptr;
  uint8_t* data = nullptr;
  uint8_t* group = nullptr;
  float* scale = nullptr;
};

struct AttentionJob {
  const float* q = nullptr;            // (R, C)
  const int32_t* positions = nullptr;  // (R,)
  KVMemory kv;
  int64_t channels = 0;  // C
  float scale = 1.0f;    // of the scores, times log2 e
  void* out = nullptr;   // (R, C)
  bool out_bf16 = false;
};

// Rows [row0, row0 + num_rows) of one sequence, positions rising; heads [head0, head0 + num_heads).
struct AttentionItem {
  const int32_t* block_table = nullptr;  // the sequence's
  int64_t row0 = 0;
  int num_rows = 0;
  int head0 = 0, num_heads = 0;
  // -1: all keys, into `out`. Else that segment only, into `partials`: [num_heads][num_rows].
  int segment = -1;
  const AttentionItem* next = nullptr;  // what the same thread is likely to run next, or null
  float* partials = nullptr;
};

constexpr int kMaxAttentionRows = 32;  // of an item

struct AttentionKernels {
  int max_rows;    // of an item, at most kMaxAttentionRows
  int max_shared;  // rows up to which an item may have several heads
  int64_t (*scratch_floats)(const AttentionJob& job, int num_rows, int num_heads);
  void (*run)(const AttentionJob& job, const AttentionItem& item, float* scratch);
  // Floats of one head's row in `partials`.
  int64_t (*part_floats)(const AttentionJob& job);
  // Merges the partials of segments 0, 1, ... of `item`, `stride` floats apart, into `out`.
  void (*merge)(const AttentionJob& job, const AttentionItem& item, const float* partials,
                int64_t stride, int num_segments, float* scratch);
};

struct Kernels {
  const char* isa = nullptr;
  DenseKernels dense_f32;
  DenseKernels dense_bf16;
  DenseKernels dense_int8;  // i8 weights, packed
  DenseKernels dense_int4;  // i8 weights, packed_nibbles

  AttentionKernels attention_f32, attention_bf16, attention_i8;  // by the cache's dtype

  // One row of n channels; out f32 or bf16.
  void (*layer_norm)(const float* x, int64_t n, const float* gain, const float* bias, float eps,
                     void* out, bool out_bf16);
  // out[i] = a[i] + b[i] in f32, a and b of the named dtype.
  void (*add_rows)(const void* a, const void* b, DType dtype, int64_t n, float* out);
  void (*convert)(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n);

  // max x[i] and sum exp(x[i] - max), in a fixed order; the sum is 0 if all are -infinity, NaN if
  // one is NaN or +infinity.
  void (*max_sum_exp)(const float* x, int64_t n, float* max, float* sum);
  // Indices i with x[i] >= threshold, rising; returns how many. `indices` holds n.
  int64_t (*select_at_least)(const float* x, int64_t n, float threshold, int32_t* indices);

  // Tiles [tile0, tile0 + tiles); scratch holds tiles * 16 * (K padded) floats. False if a weight
  // is not finite.
  bool (*quantize)(const QuantizeJob& job, int64_t tile0, int64_t tiles, float* scratch);
  // Root of the mean square of row `row` of n columns.
  float (*row_rms)(const void* w, DType dtype, int64_t row, int64_t n);

  // Of one row of logits or weights, the same bits on every instruction set: see ops.h.
  bool (*block_maxima)(const float* x, int64_t n, float* maxima);
  // Blocks whose maximum is below `skipped` have no weight; nor has what weighs `limit` or less.
  void (*exp_weights)(const float* x, const float* maxima, int64_t n, float max, float scale,
                      float skipped, float limit, float* weights, float* block_sums);
  void (*sums_above)(const float* w, int64_t n, const float* thresholds, double* sums);
  void (*keep_above)(float* w, int64_t n, float threshold, float* block_sums);
  int64_t (*select_between)(const float* x, int64_t n, float low, float high, int32_t* indices);
};

}  // namespace pyengine::cpu

// Every operation of the model, once, with shapes and dtypes. A back end implements this file.
//
// Letters: T tokens of the step, B sequences, C channels (n_embd), H heads, D head_dim (C / H),
// K and N input and output features of a dense layer, V vocabulary, R selected rows.
// Tensors are contiguous, last index fastest. `act` is the activation dtype that dense layers read:
// f32 for f32 and i8 weights, bf16 for bf16 weights. The residual stream, q, scores and logits are
// f32; gains and biases are f32 whatever the weights are.
//
// The contract of batch invariance: an output row depends on its input row (and its own keys and
// values) alone, bit for bit, at any T, any split of work and any thread count.
//   dense layers   y[n] = ((s_0 + s_1) + ...) + bias[n], where s_j is the chain from zero of
//                  fma(x[k], w[k][n], s) over k in [256 j, 256 j + 256), k rising
//                  (bf16: the pair (k, k+1) as fma(x[k], w[k], fma(x[k+1], w[k+1], s));
//                  back ends without FMA round the product first; a short last block ends early;
//                  AMX tiles, bf16 only: y is one chain over 32 k's at a time, each adding the sum
//                  of two chains of fma from zero, over the 16 even k's and over the 16 odd ones,
//                  with subnormal numbers taken for zero)
//   i8 weights     y[n] = scale[n] (s_0 i_0 + s_1 i_1 + ...) + bias[n], one chain of fma from zero:
//   s_g
//                  is the scale of 256 k's of the row, rounded to 8 bits, i_g their exact integer
//                  sum
//   attention      segments of 256 keys aligned to absolute position 0, each with a softmax of its
//                  own (its maximum, its chain over values from zero), merged in order
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kv/layout.h"
#include "ops/exec_context.h"
#include "ops/types.h"

namespace pyengine::ops {

struct Weight {
  const void* data = nullptr;
  DType dtype = DType::f32;  // f32, bf16 or i8; i8 is packed or packed_nibbles
  WeightLayout layout = WeightLayout::in_out;
  int64_t in_features = 0;         // K
  int64_t out_features = 0;        // N
  const float* scale = nullptr;    // (N,) of i8: a weight is its integer times its column's scale
  const uint8_t* group = nullptr;  // of packed_nibbles
  // Of i8: what x is, f32 rows that are quantized when read, or i8, rows that layer_norm or linear
  // have quantized (quantized_row_words). Both give the same bits.
  DType input = DType::f32;
};

// One step's tokens: sequence b owns tokens [query_start[b], query_start[b + 1]), which are the
// last ones of the context_len[b] tokens it has in the cache once this step has written them.
struct RaggedBatch {
  const int32_t* token_ids = nullptr;    // (T,)
  const int32_t* positions = nullptr;    // (T,) absolute position of each token
  const int32_t* query_start = nullptr;  // (B + 1,)
  const int32_t* context_len = nullptr;  // (B,)
  const int32_t* block_table = nullptr;  // (B, max_blocks) physical block of each logical block
  int32_t num_tokens = 0;                // T
  int32_t num_seqs = 0;                  // B
  int32_t max_blocks = 0;
};

// x[t] = wte[token_ids[t]] + wpe[positions[t]]
//   wte: the table as N = V columns of K = C: out_in of any dtype, rounded to `dtype`; packed of
//   `dtype`; or i8 (scale[id] integers[id], rounded to f32); wpe (n_positions, C) of dtype; x (T,
//   C) f32
void embed(ExecContext& ctx, const RaggedBatch& batch, const Weight& wte, const void* wpe,
           DType dtype, float* x);

// out[r] = (x[row] - mean) / sqrt(var + eps) * gain + bias, row = rows ? rows[r] : r
//   x (*, C) f32; gain, bias (C,); out (R, C) of out_dtype; i8: quantized rows
void layer_norm(ExecContext& ctx, const float* x, const int32_t* rows, int64_t num_rows,
                int64_t channels, const float* gain, const float* bias, float eps, void* out,
                DType out_dtype);

// The weights w (in_out or out_in, any dtype) in the packed layout and in `dtype`, f32 or bf16.
//   out packed_words(dtype, K, N) 32-bit words
void pack(ExecContext& ctx, const Weight& w, DType dtype, void* out);

// What quantize makes of a matrix.
struct Quantized {
  uint8_t* data = nullptr;   // int8_bytes(K, N), or nibble_bytes(K, N)
  uint8_t* group = nullptr;  // null for 8 bits: group_bytes(K, N)
  float* scale = nullptr;    // (N,)
};

// 8- or 4-bit integers for w (in_out or out_in, any float dtype) whose row k is first multiplied by
// factor[k], unless factor is null. The same bits on every instruction set. False, and nothing
// useful in `out`, if w holds NaN or infinity.
bool quantize(ExecContext& ctx, const Weight& w, const float* factor, const Quantized& out);

// rms[k] = sqrt(mean of w[k][n]^2 over n) of in_out weights, any float dtype. The same bits on
// every instruction set.
void row_rms(ExecContext& ctx, const Weight& w, float* rms);

// out = activation(x w + bias)
//   x (R, K) act; bias (N,) or null; out (R, N) of out_dtype; i8 (i8 weights only): quantized rows
void linear(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w, const float* bias,
            Activation activation, void* out, DType out_dtype);

// logits = x head, and block_max[r][i] = the largest of logits[r][64 i, 64 i + 64), NaN if one of
// them is not finite.
//   x (R, C) act; logits (R, V) f32; block_max (R, ceil(V / kLogitBlock))
void head(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& head, float* logits,
          float* block_max);

// residual += x w + bias
//   x (R, K) act; residual (R, N) f32, updated in place
void linear_residual(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w,
                     const float* bias, float* residual);

// q, k, v = split(x w + bias); q to `q`, k and v rounded to the cache's dtype and written to their
// slots: token t of sequence b at position p goes to block block_table[b][p / 16], slot p % 16.
// An i8 cache has a scale per token and head, max |x| / 127.
//   x (T, C) act; w (C, 3C); bias (3C,); q (T, C) f32, or null if only keys and values are wanted
void qkv(ExecContext& ctx, const void* x, const Weight& w, const float* bias,
         const RaggedBatch& batch, float* q, const KVLayerView& cache);

// The q of `qkv`, of some rows only.
//   x (R, C) act; w (C, 3C); bias (3C,); q (R, C) f32
void query(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& w, const float* bias,
           float* q);

// out[t, h] = softmax(scale * q[t, h] . keys[h]) values[h] over the tokens at positions <=
// positions[t] of t's sequence, keys and values as stored in the cache (so after qkv of the same
// layer).
//   q (T, C) f32; out (T, C) of out_dtype; ConfigError if head_dim > kMaxHeadDim. Here the tokens
//   of a sequence may be any of those in the cache, positions rising, or none.
void attention(ExecContext& ctx, const float* q, const RaggedBatch& batch, const KVLayerView& cache,
               float scale, void* out, DType out_dtype);

// Log-probability of one target per row and the top_n best tokens of the row, without a (R, V)
// matrix: the head is tiled over V and the log-sum-exp carried from tile to tile in order.
//   x (R, C) act; targets (R,) in [0, V); logprobs (R,); top_ids, top_logprobs (R, top_n), best
//   first, ties by lower id, after the last of V < top_n tokens -1; top_n 0..64. A row
//   whose logits are not numbers has NaN for log-probabilities.
void score_rows(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& head,
                const int32_t* targets, int32_t top_n, float* logprobs, int32_t* top_ids,
                float* top_logprobs);

// out[i] = log sum exp of logits[rows[i]], reduced in the tiles and the order of score_rows, so
// that both give one log-probability bit for bit. NaN for a row that holds NaN or +infinity, or is
// all -infinity.
//   logits (*, V) f32; out (R,)
void log_sum_exp(ExecContext& ctx, const float* logits, int64_t vocab_size, const int32_t* rows,
                 int64_t num_rows, double* out);

// Passes over one row of n logits or weights, by the calling thread. They give the same bits on
// every instruction set, so that a seed draws the same token from the same logits everywhere.
// maxima (ceil(n / kLogitBlock),): the largest of each block; false if a value is NaN.
bool block_maxima(const ExecContext& ctx, const float* x, int64_t n, float* maxima);
// weights[i] = exp((x[i] - max) scale) where that is at least `least` <= 1, else 0; scale > 0, max
// the largest x, maxima as above; block_sums (ceil(n / kLogitBlock),) of the weights.
void exp_weights(const ExecContext& ctx, const float* x, const float* maxima, int64_t n, float max,
                 float scale, double least, float* weights, float* block_sums);
// sums[k], k < kSumThresholds: of the weights above thresholds[k].
void sums_above(const ExecContext& ctx, const float* weights, int64_t n, const float* thresholds,
                double* sums);
// Weights that are not above the threshold become 0; block_sums of the others.
void keep_above(const ExecContext& ctx, float* weights, int64_t n, float threshold,
                float* block_sums);
// Indices i with low <= x[i] < high, rising; returns how many. indices (n,).
int64_t select_between(const ExecContext& ctx, const float* x, int64_t n, float low, float high,
                       int32_t* indices);

// dst blocks = src blocks, for n pairs (src, dst); no block is both read and written.
void copy_blocks(ExecContext& ctx, const KVLayerView& cache, const int32_t* pairs, int64_t n);

// Element-wise conversion between any two of f32, bf16 (round to nearest even) and f16.
void convert(ExecContext& ctx, const void* src, DType src_dtype, void* dst, DType dst_dtype,
             int64_t n);

}  // namespace pyengine::ops

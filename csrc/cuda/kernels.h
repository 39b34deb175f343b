// The kernels' launchers: what csrc/cuda/model.cu is made of. All pointers are device memory; every
// call queues work and returns. Letters as in ops/ops.h. `act` is the dtype of activations and
// weights: f32, f16 or bf16. C, K and head_dim are multiples of 8, so that every row can be read 16
// bytes at a time.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/runtime.h"
#include "kv/layout.h"
#include "ops/types.h"

namespace pyengine::cuda {

// Keys and values of one layer. A block is 16 tokens: [n_head][16][head_dim] of keys, and the same
// of values, in arrays of their own. i8: a key or value is its integer times its scale,
// [num_blocks][n_head][16].
struct KVLayer {
  DType dtype = DType::f32;  // act, or i8
  int32_t n_head = 0, head_dim = 0;
  void *keys = nullptr, *values = nullptr;
  float *key_scales = nullptr, *value_scales = nullptr;  // of i8
};

// A matrix of a quantised checkpoint (docs/quantization.md) in the order in which lanes multiply
// it, as large as in the file: N is padded to 16 and K to 64. Columns 16 i to 16 i + 15 with k's
// 64 s to 64 s + 63 are a piece; lane 4 g + t of a warp has of it columns g and g + 8, and k's
// 32 j + 8 t to + 7 for j = 0, 1.
//   int8    [N / 16][K / 64][j][lane][column g, g + 8][8]  128 + integer, a byte each
//   int4    [N / 16][K / 64][lane][j][column g, g + 8]     8 nibbles, low first: 0 2 4 6 1 3 5 7
//   groups  [N / 16][K / 64][g][j][column g, g + 8]        a byte: multiplier + 16 zero point
struct QuantizedMatrix {
  const uint8_t* integers = nullptr;
  const uint8_t* groups = nullptr;  // null: int8
  const float* scale = nullptr;     // (N,)
  int64_t k = 0, n = 0;
};

// The tokens of a step.
struct Tokens {
  const int32_t* ids = nullptr;          // (T,)
  const int32_t* positions = nullptr;    // (T,)
  const int32_t* slots = nullptr;        // (T,) in the cache: block * kBlockTokens + place in it
  const int32_t* sequence = nullptr;     // (T,) which row of the block table
  const int32_t* block_table = nullptr;  // (B, max_blocks)
  int32_t count = 0;                     // T
  int32_t max_blocks = 0;
};

// How attention goes over the tokens: sequences with one new token by themselves, the others in
// tiles of up to kQueryTile tokens of one sequence.
constexpr int kQueryTile = 64, kDecodeSegment = 64;
struct AttentionPlan {
  const int32_t* single = nullptr;  // (num_single,) token
  const int32_t* tiles = nullptr;   // (num_tiles, 2) first token, number of tokens
  int32_t num_single = 0, num_tiles = 0;
  int32_t segments = 1;      // of kDecodeSegment keys: enough for the longest context of `single`
  float* partial = nullptr;  // (num_single, H, segments, head_dim + 2)
};
inline int64_t partial_floats(int64_t num_single, int n_head, int head_dim, int segments) {
  return segments > 1 ? num_single * n_head * segments * (head_dim + 2) : 0;
}

// dst (N, K) = src (N, K), or its transpose (K, N), rounded to `to`.
void convert_weight(Stream& stream, const void* src, DType from, bool transpose, int64_t n,
                    int64_t k, void* dst, DType to);

// The integers and the groups of a file (ops/types.h: packed, packed_nibbles) in that order.
void arrange_integers(Stream& stream, const void* src, bool nibbles, int64_t k, int64_t n,
                      void* dst);
void arrange_groups(Stream& stream, const void* src, int64_t k, int64_t n, void* dst);

// x[t] = wte[ids[t]] + wpe[positions[t]]; x (T, C) f32
void embed(Stream& stream, const Tokens& tokens, const void* wte, const void* wpe, DType act,
           int channels, float* x);
void embed(Stream& stream, const Tokens& tokens, const QuantizedMatrix& wte, const void* wpe,
           DType act, float* x);

class Blas;

struct Norm {
  const float *gain = nullptr, *bias = nullptr;  // (C,)
  float eps = 0;
};

// ops::layer_norm; out (R, C) of act
void layer_norm(Stream& stream, const float* x, const int32_t* rows, int num_rows, int channels,
                const Norm& norm, void* out, DType act);

struct Dense {
  const void* weight = nullptr;    // (N, K) act; null: quantised
  const float* bias = nullptr;     // (N,) or null
  const void* bias_act = nullptr;  // the same of act, for cuBLASLt
  int64_t k = 0, n = 0;
  QuantizedMatrix quantized = {};  // integers are exact in act; their scale is applied to the sums
};

// What becomes of y: out = y of act; out = y, f32; out += y, f32; `qkv`: queries to the first
// columns of out (R, 3C) act, keys and values to their slots of the cache.
enum class Output { act, f32, add, qkv };
struct DenseResult {
  Output output = Output::act;
  void* out = nullptr;
  ops::Activation activation = ops::Activation::none;
  // of qkv: the tokens' slots, in a cache of act
  Tokens tokens = {};
  KVLayer cache = {};
};

// y = activation(x w + bias); x (R, K) act; out (R, N). Up to kFewRows rows (kFewRowsF32 in
// float32) read the weights once and are reduced alike, whatever their number. If `blas` is not
// null, more than kFewRowsBlas rows (kFewRowsF32) are cuBLASLt's where it is faster
// (csrc/cuda/blas.h). Of quantised weights few rows are up to kFewQuantizedRows, and all in
// float32.
constexpr int kFewRows = 64, kFewRowsF32 = 8, kFewRowsBlas = 16, kFewQuantizedRows = 32;
void dense(Stream& stream, Blas* blas, const void* x, DType act, int num_rows, const Dense& layer,
           const DenseResult& result);

// The same of layer_norm(x); x (R, K) f32; `normed` (R, K) act is scratch.
void dense_of_norm(Stream& stream, Blas* blas, const float* x, const Norm& norm, void* normed,
                   DType act, int num_rows, const Dense& layer, const DenseResult& result);

// Keys and values of qkv (T, 3C) act to their slots.
void write_kv(Stream& stream, const void* qkv, DType act, const Tokens& tokens,
              const KVLayer& cache);

// ops::attention; q are the first C columns of qkv (T, 3C) act; out (T, C) act.
void attention(Stream& stream, const void* qkv, DType act, const Tokens& tokens,
               const AttentionPlan& plan, const KVLayer& cache, float scale, void* out);

// Blocks of block_bytes (a multiple of 16): pairs (n, 2) of source and target.
void copy_blocks(Stream& stream, void* blocks, size_t block_bytes, const int32_t* pairs, int n);

}  // namespace pyengine::cuda

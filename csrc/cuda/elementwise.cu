// Embedding, layer norm, conversion of weights, copies of KV blocks: a value is read once and
// written once, 16 bytes at a time. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/norm.cuh"
#include "cuda/types.h"

namespace pyengine::cuda {

namespace {

// A block per token; a thread adds eight channels at a time.
// Budget of embed_kernel<*>: 128 threads, 64 registers; LDG.128 STG.128
template <class T>
__global__ void __launch_bounds__(128)
    embed_kernel(const int32_t* ids, const int32_t* positions, const T* wte, const T* wpe,
                 int channels, float* x) {
  start_after_previous();
  const int64_t t = blockIdx.x;
  const T* token = wte + int64_t{ids[t]} * channels;
  const T* position = wpe + int64_t{positions[t]} * channels;
  for (int c = static_cast<int>(threadIdx.x) * 8; c < channels; c += 128 * 8) {
    float a[8], b[8];
    load8(token + c, a);
    load8(position + c, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] += b[i];
    store8(x + t * channels + c, a);
  }
}

// A warp per row.
// Budget of layer_norm_kernel<*>: 128 threads, 168 registers; LDG.128 STG.128
template <class T>
__global__ void __launch_bounds__(128)
    layer_norm_kernel(const float* x, const int32_t* rows, int num_rows, int channels, Norm norm,
                      T* out) {
  prefetch_norm(norm, channels, static_cast<int>(threadIdx.x), 128);
  start_after_previous();
  const int64_t r = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (r >= num_rows) return;
  const float* row = x + (rows != nullptr ? int64_t{rows[r]} : r) * channels;
  normalise_row<8>(row, channels, norm, static_cast<int>(threadIdx.x) % 32,
                   [&](int c, const float (&v)[8]) { store8(out + r * channels + c, v); });
}

// 32 x 32 tiles; transposed in shared memory, whose rows are one longer so that a column lies in
// 32 banks.
// Budget of convert_weight_kernel<*>: 256 threads, 64 registers, 4224 bytes shared
template <class From, class To>
__global__ void __launch_bounds__(256)
    convert_weight_kernel(const From* src, bool transpose, int64_t n, int64_t k, To* dst) {
  start_after_previous();
  PYENGINE_SHARED(tile, float[32][33]);
  const int64_t n0 = int64_t{blockIdx.y} * 32, k0 = int64_t{blockIdx.x} * 32;
  const int x = static_cast<int>(threadIdx.x) % 32, y = static_cast<int>(threadIdx.x) / 32;
  for (int i = y; i < 32; i += 8) {
    // Rows of the source run along k, or along n if it is to be transposed.
    const int64_t row_n = transpose ? n0 + x : n0 + i, row_k = transpose ? k0 + i : k0 + x;
    if (row_n < n && row_k < k) {
      const float value = widen(src[transpose ? row_k * n + row_n : row_n * k + row_k]);
      tile[transpose ? x : i][transpose ? i : x] = value;
    }
  }
  __syncthreads();
  for (int i = y; i < 32; i += 8) {
    if (n0 + i < n && k0 + x < k) dst[(n0 + i) * k + k0 + x] = narrowed<To>(tile[i][x]);
  }
}

// Budget of copy_blocks_kernel: 128 threads, 40 registers; LDG.128 STG.128
__global__ void __launch_bounds__(128)
    copy_blocks_kernel(uint4* blocks, int64_t block_words, const int32_t* pairs) {
  start_after_previous();
  const uint4* from = blocks + block_words * pairs[2 * blockIdx.x];
  uint4* to = blocks + block_words * pairs[2 * blockIdx.x + 1];
  const int64_t step = int64_t{gridDim.y} * 128;
  for (int64_t i = int64_t{blockIdx.y} * 128 + threadIdx.x; i < block_words; i += step) {
    to[i] = from[i];
  }
}

}  // namespace

void embed(Stream& stream, const Tokens& tokens, const void* wte, const void* wpe, DType act,
           int channels, float* x) {
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("embed", stream, embed_kernel<T>, tokens.count, 128, 0, tokens.ids, tokens.positions,
           static_cast<const T*>(wte), static_cast<const T*>(wpe), channels, x);
  });
}

void layer_norm(Stream& stream, const float* x, const int32_t* rows, int num_rows, int channels,
                const Norm& norm, void* out, DType act) {
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("layer_norm", stream, layer_norm_kernel<T>, blocks_of(num_rows, 4), 128, 0, x, rows,
           num_rows, channels, norm, static_cast<T*>(out));
  });
}

void convert_weight(Stream& stream, const void* src, DType from, bool transpose, int64_t n,
                    int64_t k, void* dst, DType to) {
  with_type(from, [&](auto from_tag) {
    with_type(to, [&](auto to_tag) {
      using From = typename decltype(from_tag)::type;
      using To = typename decltype(to_tag)::type;
      launch("convert_weight", stream, convert_weight_kernel<From, To>,
             dim3(blocks_of(k, 32), blocks_of(n, 32)), 256, 0, static_cast<const From*>(src),
             transpose, n, k, static_cast<To*>(dst));
    });
  });
}

void copy_blocks(Stream& stream, void* blocks, size_t block_bytes, const int32_t* pairs, int n) {
  const auto words = static_cast<int64_t>(block_bytes / 16);
  launch("copy_blocks", stream, copy_blocks_kernel, dim3(n, blocks_of(words, 128 * 8)), 128, 0,
         static_cast<uint4*>(blocks), words, pairs);
}

}  // namespace pyengine::cuda

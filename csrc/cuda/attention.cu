// Attention over the paged cache. A sequence with one new token: flash-decoding, a block per
// segment of 64 keys and head, partial results merged in order. A sequence with more: tiles of
// queries against tiles of keys with a running softmax, on tensor cores where the cache is float16
// or bfloat16 (FlashAttention-2, Dao 2023), otherwise (float32, other head sizes) in float32.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/tensor_core.h"
#include "cuda/types.h"

namespace pyengine::cuda {

namespace {

// One layer's cache as kernels see it.
template <class KV>
struct Cache {
  const KV *keys, *values;
  const float *key_scales, *value_scales;
  int n_head, head_dim;

  // Which row of head_dim values (and which scale) a token has.
  __device__ int64_t row(const int32_t* table, int token, int head) const {
    return row_of_slot(table[token / kBlockTokens] * kBlockTokens + token % kBlockTokens, n_head,
                       head);
  }
};

template <class KV>
__device__ inline float scale_of(const float* scales, int64_t row) {
  return sizeof(KV) == 1 ? scales[row] : 1.0f;
}

constexpr int kDecodeThreads = 128;
// Keys of a lane, and values of a thread, that are on their way at the same time.
constexpr int kLaneKeys = kDecodeSegment / (kDecodeThreads / 8), kThreadValues = 4;

// Grid (singles, heads, segments). Scores: eight lanes per key, which read its row 16 bytes at a
// time and side by side. Values: groups of head_dim / 8 threads, each thread with eight channels of
// every so many-th key. Keys and values of earlier steps are asked for before the kernel before has
// ended; only those of the token itself are its. `partial` is null where there is one segment only:
// the result then goes to `out`.
// Budget of decode_attention<*>: 128 threads, 104 registers, 5392 bytes shared; LDG.128
// Budget of decode_attention<*, signed char>: 128 threads, 104 registers, 5392 bytes shared; LDG.64
// Budget of decode_attention<float, float>: 128 threads, 128 registers, 5392 bytes shared; LDG.128
// Budget of decode_attention<float, signed char>: 128 threads, 104 registers, 5392 bytes shared
template <class T, class KV>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(KV) == 4 ? 4 : 5)
    decode_attention(const T* qkv, Tokens tokens, const int32_t* single, Cache<KV> cache,
                     float scale, float* partial, T* out) {
  PYENGINE_SHARED(q, float[kMaxHeadDim]);
  PYENGINE_SHARED(weights, float[kDecodeSegment]);
  PYENGINE_SHARED(scratch, float[kDecodeThreads / 32]);
  PYENGINE_SHARED(sums, float[kDecodeThreads * 8]);
  const int head_dim = cache.head_dim, head = static_cast<int>(blockIdx.y);
  const int64_t token = single[blockIdx.x];
  const int32_t* table = tokens.block_table + int64_t{tokens.sequence[token]} * tokens.max_blocks;
  const int begin = static_cast<int>(blockIdx.z) * kDecodeSegment;
  const int newest = tokens.positions[token] - begin;  // of the segment's keys, if it is there
  const int n = newest < kDecodeSegment ? newest + 1 : kDecodeSegment;
  const int thread = static_cast<int>(threadIdx.x), part = thread % 8;
  const int vectors = head_dim / 8, groups = kDecodeThreads / vectors;
  const int group = thread / vectors, d0 = thread % vectors * 8;

  int64_t key_row[kLaneKeys], value_row[kThreadValues];
  Packed8<KV> keys[kLaneKeys] = {}, values[kThreadValues] = {};
  auto key_of = [&](int u) { return thread / 8 + u * (kDecodeThreads / 8); };
  auto value_of = [&](int u) { return group < groups ? group + u * groups : kDecodeSegment; };
  auto read_both = [&](auto&& wanted) {
#pragma unroll
    for (int u = 0; u < kLaneKeys; ++u) {
      if (key_of(u) < n && part * 8 < head_dim && wanted(key_of(u))) {
        keys[u] = read8(cache.keys + key_row[u] * head_dim + part * 8);
      }
    }
#pragma unroll
    for (int u = 0; u < kThreadValues; ++u) {
      if (value_of(u) < n && wanted(value_of(u))) {
        values[u] = read8(cache.values + value_row[u] * head_dim + d0);
      }
    }
  };
#pragma unroll
  for (int u = 0; u < kLaneKeys; ++u) {
    key_row[u] = key_of(u) < n ? cache.row(table, begin + key_of(u), head) : 0;
  }
#pragma unroll
  for (int u = 0; u < kThreadValues; ++u) {
    value_row[u] = value_of(u) < n ? cache.row(table, begin + value_of(u), head) : 0;
  }
  read_both([&](int j) { return j != newest; });
  start_after_previous();
  if (n <= 0) return;  // the whole block
  read_both([&](int j) { return j == newest; });
  const int64_t channels = int64_t{cache.n_head} * head_dim;
  for (int d = thread; d < head_dim; d += kDecodeThreads) {
    q[d] = widen(qkv[token * 3 * channels + head * head_dim + d]) * scale;
  }
  __syncthreads();

  float best = -INFINITY;
#pragma unroll
  for (int u = 0; u < kLaneKeys; ++u) {
    const int j = key_of(u);
    float score = 0;
    if (j < n) {
      float k8[8];
      unpack8(keys[u], k8);
      for (int d = part * 8; d < head_dim; d += 64) {
        if (d >= 64) load8(cache.keys + key_row[u] * head_dim + d, k8);
#pragma unroll
        for (int i = 0; i < 8; ++i) score += k8[i] * q[d + i];
      }
    }
    score = warp_sum(score, 8);
    if (j >= n) continue;
    score *= scale_of<KV>(cache.key_scales, key_row[u]);
    if (part == 0) weights[j] = score;
    best = fmaxf(best, score);
  }
  best = block_max(best, scratch);
  float sum = 0;
  for (int j = thread; j < n; j += kDecodeThreads) {
    const float weight = expf(weights[j] - best);
    sum += weight;
    weights[j] = weight * scale_of<KV>(cache.value_scales, cache.row(table, begin + j, head));
  }
  sum = block_sum(sum, scratch);  // its barriers also let everyone see the weights

  float acc[8] = {};
  auto weigh = [&](int j, const float (&v8)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] += weights[j] * v8[i];
  };
#pragma unroll
  for (int u = 0; u < kThreadValues; ++u) {
    if (value_of(u) >= n) continue;
    float v8[8];
    unpack8(values[u], v8);
    weigh(value_of(u), v8);
  }
  for (int j = value_of(kThreadValues); j < n; j += groups) {  // of large heads
    float v8[8];
    load8(cache.values + cache.row(table, begin + j, head) * head_dim + d0, v8);
    weigh(j, v8);
  }
  if (group < groups) store8(sums + group * head_dim + d0, acc);
  __syncthreads();
  float* result = partial;
  if (partial != nullptr) {
    const int64_t place = (int64_t{blockIdx.x} * cache.n_head + head) * gridDim.z + blockIdx.z;
    result = partial + place * (head_dim + 2);
    if (thread == 0) {
      result[0] = best;
      result[1] = sum;
    }
  }
  for (int c = thread; c < head_dim; c += kDecodeThreads) {
    float total = sums[c];
#pragma unroll 4
    for (int g = 1; g < groups; ++g) total += sums[g * head_dim + c];
    if (partial != nullptr) {
      result[2 + c] = total;
    } else {
      out[token * channels + head * head_dim + c] = narrowed<T>(total / sum);
    }
  }
}

// Grid (singles, heads). Segments are merged in the order of their keys.
// Budget of merge_segments<*>: 64 threads, 64 registers
template <class T>
__global__ void __launch_bounds__(64)
    merge_segments(const float* partial, Tokens tokens, const int32_t* single, int head_dim,
                   int segments, T* out) {
  const int64_t token = single[blockIdx.x];
  const int64_t place = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  const float* parts = partial + place * segments * (head_dim + 2);
  const int used = tokens.positions[token] / kDecodeSegment + 1;
  start_after_previous();
  float best = parts[0];
#pragma unroll 8
  for (int s = 1; s < used; ++s) best = fmaxf(best, parts[s * (head_dim + 2)]);
  for (int c = static_cast<int>(threadIdx.x); c < head_dim; c += 64) {
    float sum = 0, total = 0;
#pragma unroll 4
    for (int s = 0; s < used; ++s) {
      const float* part = parts + s * (head_dim + 2);
      const float weight = expf(part[0] - best);
      sum += weight * part[1];
      total += weight * part[2 + c];
    }
    out[(token * gridDim.y + blockIdx.y) * head_dim + c] = narrowed<T>(total / sum);
  }
}

// Grid (4 quarters of each tile, heads): 16 queries, four per warp, against 32 keys at a time. A
// lane scores one key; then it owns every 32nd channel of the output.
// Budget of prefill_attention_f32<*>: 128 threads, 104 registers, 2048 bytes shared
constexpr int kQuarter = kQueryTile / 4, kKeys = 32, kPerWarp = 4;
constexpr int kLaneChannels = kMaxHeadDim / 32;
template <class T, class KV>
__global__ void __launch_bounds__(128)
    prefill_attention_f32(const T* qkv, Tokens tokens, const int32_t* tiles, Cache<KV> cache,
                          float scale, T* out) {
  start_after_previous();
  PYENGINE_SHARED(weights, float4[4][kKeys]);  // of a warp's four queries, by key
  PYENGINE_DYNAMIC_SHARED(memory);
  const int head_dim = cache.head_dim, head = static_cast<int>(blockIdx.y);
  const int pitch = head_dim + 1;                      // a column then lies in 32 different banks
  float* const qs = reinterpret_cast<float*>(memory);  // [16][head_dim]
  float* const ks = qs + kQuarter * head_dim;          // [32][pitch]
  float* const vs = ks + kKeys * pitch;                // [32][pitch]
  const int first_in_tile = static_cast<int>(blockIdx.x) % 4 * kQuarter;
  const int32_t* tile = tiles + blockIdx.x / 4 * 2;
  const int left = tile[1] - first_in_tile;
  if (left <= 0) return;  // the whole block
  const int queries = left < kQuarter ? left : kQuarter;
  const int64_t token0 = tile[0] + first_in_tile;
  const int32_t* table = tokens.block_table + int64_t{tokens.sequence[token0]} * tokens.max_blocks;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t channels = int64_t{cache.n_head} * head_dim;
  for (int i = thread; i < queries * head_dim; i += 128) {
    const int64_t from = (token0 + i / head_dim) * 3 * channels + head * head_dim + i % head_dim;
    qs[i] = widen(qkv[from]) * scale;
  }
  // Queries that the tile lacks repeat its last one, and are not stored.
  int query[kPerWarp], position[kPerWarp];
  float best[kPerWarp], sum[kPerWarp], acc[kPerWarp][kLaneChannels] = {};
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int wanted = warp * kPerWarp + i;
    query[i] = wanted < queries ? wanted : queries - 1;
    position[i] = tokens.positions[token0 + query[i]];
    best[i] = -INFINITY;
    sum[i] = 0;
  }
  const int num_keys = tokens.positions[token0 + queries - 1] + 1;
  for (int key0 = 0; key0 < num_keys; key0 += kKeys) {
    __syncthreads();  // nobody reads the tile before any more
    for (int i = thread; i < kKeys * head_dim; i += 128) {
      const int j = i / head_dim, d = i % head_dim;
      float key = 0, value = 0;
      if (key0 + j < num_keys) {
        const int64_t row = cache.row(table, key0 + j, head);
        key = widen(cache.keys[row * head_dim + d]) * scale_of<KV>(cache.key_scales, row);
        value = widen(cache.values[row * head_dim + d]) * scale_of<KV>(cache.value_scales, row);
      }
      ks[j * pitch + d] = key;
      vs[j * pitch + d] = value;
    }
    __syncthreads();
    float weight[kPerWarp] = {};
    for (int d = 0; d < head_dim; ++d) {
      const float key = ks[lane * pitch + d];
#pragma unroll
      for (int i = 0; i < kPerWarp; ++i) weight[i] += qs[query[i] * head_dim + d] * key;
    }
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      const bool seen = key0 + lane <= position[i];
      const float score = seen ? weight[i] : -INFINITY;
      const float top = fmaxf(best[i], warp_max(score));
      const float shrink = expf(best[i] - top);  // 0 at first: exp(-inf)
      weight[i] = seen ? expf(score - top) : 0.0f;
      sum[i] = sum[i] * shrink + warp_sum(weight[i]);
      best[i] = top;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) acc[i][c] *= shrink;
    }
    weights[warp][lane] = {weight[0], weight[1], weight[2], weight[3]};
    __syncwarp();
    for (int j = 0; j < kKeys; ++j) {
      const float4 of_key = weights[warp][j];
      const float p[kPerWarp] = {of_key.x, of_key.y, of_key.z, of_key.w};
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        if (c * 32 + lane < head_dim) {
          const float value = vs[j * pitch + c * 32 + lane];
#pragma unroll
          for (int i = 0; i < kPerWarp; ++i) acc[i][c] += p[i] * value;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    if (warp * kPerWarp + i >= queries) continue;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const int d = c * 32 + lane;
      if (d >= head_dim) continue;
      out[(token0 + query[i]) * channels + head * head_dim + d] = narrowed<T>(acc[i][c] / sum[i]);
    }
  }
}

// Grid (tiles, heads). FlashAttention-2: 64 queries, 16 per warp, against 64 keys at a time. While
// scores are computed the values are on their way, and while values are weighed the next keys.
// Scores leave one product in the very registers in which the next wants them.
// The integers of an int8 cache are values of T as they are; their scales go to the scores and to
// the probabilities. There are no asynchronous copies of them.
// Budget of prefill_attention<*>: 128 threads, 168 registers; HMMA LDSM LDGSTS.128
// Budget of prefill_attention<*, 96>: 128 threads, 192 registers; HMMA LDSM LDGSTS.128
// Budget of prefill_attention<*, 128>: 128 threads, 232 registers; HMMA LDSM LDGSTS.128
// Budget of prefill_attention<*, signed char*>: 128 threads, 232 registers, 768 bytes shared; HMMA
constexpr int kTileKeys = 64;
template <class T, class KV, int head_dim>
__global__ void __launch_bounds__(128, 1)
    prefill_attention(const T* qkv, Tokens tokens, const int32_t* tiles, Cache<KV> cache,
                      float scale, T* out) {
  start_after_previous();
  constexpr int kPitch = head_dim + 8;  // 16 bytes more: eight rows lie in 32 different banks
  constexpr int kVectors = head_dim / 8, kDepth = head_dim / 16;
  constexpr bool kInt8 = sizeof(KV) == 1;
  // Keys of the next tile come while this one's scales are still wanted.
  PYENGINE_SHARED(key_scales, float[2][kInt8 ? kTileKeys : 1]);
  PYENGINE_SHARED(value_scales, float[kInt8 ? kTileKeys : 1]);
  PYENGINE_DYNAMIC_SHARED(memory);
  T* const qs = reinterpret_cast<T*>(memory);  // [64][kPitch]
  T* const ks = qs + kQueryTile * kPitch;
  T* const vs = ks + kTileKeys * kPitch;
  const int64_t token0 = tiles[2 * blockIdx.x];
  const int queries = tiles[2 * blockIdx.x + 1], head = static_cast<int>(blockIdx.y);
  const int32_t* table = tokens.block_table + int64_t{tokens.sequence[token0]} * tokens.max_blocks;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t channels = int64_t{cache.n_head} * head_dim;
  const int num_keys = tokens.positions[token0 + queries - 1] + 1;

  auto load_rows = [&](const KV* from, const float* scales, T* to, float* to_scales, int key0) {
    for (int i = thread; i < kTileKeys * kVectors; i += 128) {
      const int j = i / kVectors, d = i % kVectors * 8;
      const bool valid = key0 + j < num_keys;
      const int64_t row = valid ? cache.row(table, key0 + j, head) : 0;
      // Zeros for what is not there: 0 times what memory may hold need not be 0.
      if constexpr (kInt8) {
        float x[8] = {};
        if (valid) load8(from + row * head_dim + d, x);
        store8(to + j * kPitch + d, x);
        if (d == 0) to_scales[j] = valid ? scales[row] : 0.0f;
      } else {
        copy_async(to + j * kPitch + d, valid ? from + row * head_dim + d : from, valid);
      }
    }
  };
  auto load_keys = [&](int key0) {
    load_rows(cache.keys, cache.key_scales, ks, key_scales[key0 / kTileKeys % 2], key0);
  };
  for (int i = thread; i < kQueryTile * kVectors; i += 128) {
    const int row = i / kVectors, d = i % kVectors * 8;
    const bool valid = row < queries;
    copy_async(qs + row * kPitch + d,
               valid ? qkv + (token0 + row) * 3 * channels + head * head_dim + d : qkv, valid);
  }
  load_keys(0);
  copy_async_commit();

  const float log2_scale = scale * 1.4426950409f;  // scores are powers of 2 from here on
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + r * 8;
    position[r] = tokens.positions[token0 + (row < queries ? row : queries - 1)];
  }
  uint32_t q[kDepth][4];
  float acc[head_dim / 8][4] = {};
  float best[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int key0 = 0; key0 < num_keys; key0 += kTileKeys) {
    copy_async_wait<0>();
    __syncthreads();  // keys are there, and nobody reads the values before any more
    load_rows(cache.values, cache.value_scales, vs, value_scales, key0);
    copy_async_commit();
    if (key0 == 0) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        ldmatrix4(q[i], qs + (warp * 16 + lane % 16) * kPitch + i * 16 + lane / 16 * 8);
      }
    }
    float scores[kTileKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
#pragma unroll
      for (int j = 0; j < kTileKeys / 16; ++j) {
        uint32_t b[4];
        const int row = j * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix4(b, ks + row * kPitch + i * 16 + lane / 8 % 2 * 8);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma<T>(scores[2 * j], q[i], low);
        mma<T>(scores[2 * j + 1], q[i], high);
      }
    }
    __syncthreads();  // nobody reads these keys any more
    if (key0 + kTileKeys < num_keys) load_keys(key0 + kTileKeys);
    copy_async_commit();

#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows lane / 4 and lane / 4 + 8, each shared by four lanes
      float top = best[r];
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          const int key = j * 8 + lane % 4 * 2 + e % 2;
          if constexpr (kInt8) scores[j][e] *= key_scales[key0 / kTileKeys % 2][key];
          scores[j][e] = key0 + key <= position[r] ? scores[j][e] * log2_scale : -INFINITY;
          top = fmaxf(top, scores[j][e]);
        }
      }
      top = warp_max(top, 4);
      const float shrink = exp2f(best[r] - top);
      best[r] = top;
      float part = 0;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          scores[j][e] = exp2f(scores[j][e] - top);
          part += scores[j][e];
        }
      }
      sum[r] = sum[r] * shrink + part;
#pragma unroll
      for (int d = 0; d < head_dim / 8; ++d) {
        acc[d][2 * r] *= shrink;
        acc[d][2 * r + 1] *= shrink;
      }
    }
    copy_async_wait<1>();
    __syncthreads();  // values are there
    if constexpr (kInt8) {
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[j][e] *= value_scales[j * 8 + lane % 4 * 2 + e % 2];
      }
    }
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      const uint32_t p[4] = {pair_of<T>(scores[2 * j][0], scores[2 * j][1]),
                             pair_of<T>(scores[2 * j][2], scores[2 * j][3]),
                             pair_of<T>(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                             pair_of<T>(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        uint32_t b[4];
        const int row = j * 16 + lane / 8 % 2 * 8 + lane % 8;
        ldmatrix4_transposed(b, vs + row * kPitch + d * 16 + lane / 16 * 8);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma<T>(acc[2 * d], p, low);
        mma<T>(acc[2 * d + 1], p, high);
      }
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = warp_sum(sum[r], 4);
    const int row = warp * 16 + lane / 4 + r * 8;
    if (row >= queries) continue;
    T* const to = out + (token0 + row) * channels + head * head_dim + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < head_dim / 8; ++d) {
      *reinterpret_cast<uint32_t*>(to + d * 8) =
          pair_of<T>(acc[d][2 * r] / total, acc[d][2 * r + 1] / total);
    }
  }
}

// Grid (tokens, 2): keys, then values; four warps take the heads in turn. An i8 row is divided by
// its largest magnitude over 127.
// Budget of write_kv_kernel<*>: 128 threads, 48 registers; LDG.128 STG.128
// Budget of write_kv_kernel<*, signed char>: 128 threads, 48 registers; LDG.128 STG.64
template <class T, class KV>
__global__ void __launch_bounds__(128)
    write_kv_kernel(const T* qkv, Tokens tokens, int n_head, int head_dim, KV* keys, KV* values,
                    float* key_scales, float* value_scales) {
  start_after_previous();
  const int64_t t = blockIdx.x, channels = int64_t{n_head} * head_dim;
  const int slot = tokens.slots[t];
  const T* from = qkv + (t * 3 + 1 + blockIdx.y) * channels;
  KV* to = blockIdx.y == 0 ? keys : values;
  float* scales = blockIdx.y == 0 ? key_scales : value_scales;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int head = static_cast<int>(threadIdx.x) / 32; head < n_head; head += 4) {
    const int64_t row = row_of_slot(slot, n_head, head);
    float x[8] = {};
    const bool has = lane * 8 < head_dim;  // at most 256 channels
    if (has) load8(from + head * head_dim + lane * 8, x);
    if constexpr (sizeof(KV) == 1) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
      largest = warp_max(largest);
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      if (lane == 0) scales[row] = largest / 127.0f;
      if (has) {
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int value = static_cast<int>(rintf(x[i] * inverse));
          words[i / 4] |= static_cast<uint32_t>(value & 0xff) << (i % 4 * 8);
        }
        *reinterpret_cast<uint2*>(to + row * head_dim + lane * 8) = {words[0], words[1]};
      }
    } else if (has) {
      store8(to + row * head_dim + lane * 8, x);
    }
  }
}

template <class KV>
Cache<KV> view(const KVLayer& cache) {
  return {static_cast<const KV*>(cache.keys),
          static_cast<const KV*>(cache.values),
          cache.key_scales,
          cache.value_scales,
          cache.n_head,
          cache.head_dim};
}

template <class T, class KV>
void attend_singles(Stream& stream, const T* qkv, const Tokens& tokens, const AttentionPlan& plan,
                    const KVLayer& cache, float scale, T* out) {
  if (plan.num_single == 0) return;
  launch("decode_attention", stream, decode_attention<T, KV>,
         dim3(plan.num_single, cache.n_head, plan.segments), kDecodeThreads, 0, qkv, tokens,
         plan.single, view<KV>(cache), scale, plan.segments > 1 ? plan.partial : nullptr, out);
  if (plan.segments > 1) {
    launch("merge_segments", stream, merge_segments<T>, dim3(plan.num_single, cache.n_head), 64, 0,
           plan.partial, tokens, plan.single, cache.head_dim, plan.segments, out);
  }
}

template <class T, class KV>
void attend_tiles_f32(Stream& stream, const T* qkv, const Tokens& tokens, const AttentionPlan& plan,
                      const KVLayer& cache, float scale, T* out) {
  const size_t shared =
      sizeof(float) * (kQuarter * cache.head_dim + 2 * kKeys * (cache.head_dim + 1));
  launch("prefill_attention_f32", stream, prefill_attention_f32<T, KV>,
         dim3(plan.num_tiles * 4, cache.n_head), 128, shared, qkv, tokens, plan.tiles,
         view<KV>(cache), scale, out);
}

template <int head_dim, class T, class KV>
void attend_tiles_of(Stream& stream, const T* qkv, const Tokens& tokens, const AttentionPlan& plan,
                     const KVLayer& cache, float scale, T* out) {
  const size_t shared = sizeof(T) * (kQueryTile + 2 * kTileKeys) * (head_dim + 8);
  launch("prefill_attention", stream, prefill_attention<T, KV, head_dim>,
         dim3(plan.num_tiles, cache.n_head), 128, shared, qkv, tokens, plan.tiles, view<KV>(cache),
         scale, out);
}

template <class T, class KV>
void attend_tiles(Stream& stream, const T* qkv, const Tokens& tokens, const AttentionPlan& plan,
                  const KVLayer& cache, float scale, T* out) {
  if (plan.num_tiles == 0) return;
  if constexpr (sizeof(T) == 2) {
    switch (cache.head_dim) {
      case 32:
        return attend_tiles_of<32, T, KV>(stream, qkv, tokens, plan, cache, scale, out);
      case 64:
        return attend_tiles_of<64, T, KV>(stream, qkv, tokens, plan, cache, scale, out);
      case 80:
        return attend_tiles_of<80, T, KV>(stream, qkv, tokens, plan, cache, scale, out);
      case 96:
        return attend_tiles_of<96, T, KV>(stream, qkv, tokens, plan, cache, scale, out);
      case 128:
        return attend_tiles_of<128, T, KV>(stream, qkv, tokens, plan, cache, scale, out);
      default:
        break;
    }
  }
  attend_tiles_f32<T, KV>(stream, qkv, tokens, plan, cache, scale, out);
}

template <class T, class KV>
void attend(Stream& stream, const T* qkv, const Tokens& tokens, const AttentionPlan& plan,
            const KVLayer& cache, float scale, T* out) {
  attend_singles<T, KV>(stream, qkv, tokens, plan, cache, scale, out);
  attend_tiles<T, KV>(stream, qkv, tokens, plan, cache, scale, out);
}

}  // namespace

void attention(Stream& stream, const void* qkv, DType act, const Tokens& tokens,
               const AttentionPlan& plan, const KVLayer& cache, float scale, void* out) {
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* from = static_cast<const T*>(qkv);
    auto* const to = static_cast<T*>(out);
    if (cache.dtype == DType::i8) {
      attend<T, int8_t>(stream, from, tokens, plan, cache, scale, to);
    } else {
      attend<T, T>(stream, from, tokens, plan, cache, scale, to);
    }
  });
}

void write_kv(Stream& stream, const void* qkv, DType act, const Tokens& tokens,
              const KVLayer& cache) {
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(tokens.count, 2);
    if (cache.dtype == DType::i8) {
      launch("write_kv", stream, write_kv_kernel<T, int8_t>, grid, 128, 0,
             static_cast<const T*>(qkv), tokens, cache.n_head, cache.head_dim,
             static_cast<int8_t*>(cache.keys), static_cast<int8_t*>(cache.values), cache.key_scales,
             cache.value_scales);
    } else {
      launch("write_kv", stream, write_kv_kernel<T, T>, grid, 128, 0, static_cast<const T*>(qkv),
             tokens, cache.n_head, cache.head_dim, static_cast<T*>(cache.keys),
             static_cast<T*>(cache.values), cache.key_scales, cache.value_scales);
    }
  });
}

}  // namespace pyengine::cuda

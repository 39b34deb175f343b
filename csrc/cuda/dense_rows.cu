// Dense layers of up to 64 rows in float16 and bfloat16: every weight is read once, from memory
// straight into the registers in which a tensor-core product wants it.
//
// The product is y^T = w x^T: 16 columns of y (rows of w) by 8 rows of x, 16 k's at a time. In
// which order the k's are summed is ours to choose, so lane 4 g + t takes k's [8 t, 8 t + 8) of a
// chunk of 32 for the eight that two products ask it for: 16 bytes at one place, of w and of x
// alike, where the layout of the products' fragments has 4 bytes at four places.
//
// A block has 16 or 32 columns; its warps take the chunks in turn and their sums are added in a
// fixed order. The order of a row's sum depends on K and N alone.
#include "cuda/dense.cuh"
#include "cuda/norm.cuh"
#include "cuda/tensor_core.h"

namespace pyengine::cuda {

namespace {

constexpr int kChunk = 32;

// How a matrix is cut, by its K and N alone: columns of a block (in tiles of 16) and its warps.
template <int column_tiles, int warps>
struct Cut {
  static constexpr int kColumnTiles = column_tiles, kWarps = warps;
};
using Usual = Cut<1, 8>;
// A long K needs more loads on their way at a time than 8 warps have.
using Long = Cut<1, 16>;
constexpr int64_t kLong = 2048;
// Of a matrix of many columns (the head) each block takes twice as many: x is read half as often.
using Wide = Cut<2, 4>;

// Chunks of each warp that are on their way: all of K = 768, and of K = 3072 for few rows.
__host__ __device__ constexpr int ahead_of(int row_tiles, int warps) {
  if (warps == 16) return row_tiles <= 2 ? 6 : row_tiles == 4 ? 3 : 1;
  return 3;
}

// Elements from one normed row in shared memory to the next: 64 bytes more than a multiple of 128,
// so that the 16-byte reads of two rows lie in different banks.
__host__ __device__ constexpr int norm_pitch(int64_t k) {
  return static_cast<int>((k + 63) / 64 * 64 + 32);
}

// Sums that are in shared memory at a time: 16 warps first add theirs in pairs.
__host__ __device__ constexpr int parts_of(int warps) { return warps < 8 ? warps : 8; }

// x: (m, k) of T, or f32 rows that are to be normed first if kNormed.
// Shared memory: sums, [parts][rows][columns + 4]; then normed rows.
// Budget of dense_rows_kernel<*, [124], 1, 8, false>: 256 threads, 104 registers; HMMA LDG.128
// Budget of dense_rows_kernel<*, 8, 1, 8, false>: 256 threads, 104 registers; HMMA LDG.128
// Budget of dense_rows_kernel<*, *, 1, 16, false>: 512 threads, 128 registers; HMMA LDG.128
// Budget of dense_rows_kernel<*, [124], 2, 4, false>: 128 threads, 136 registers; HMMA LDG.128
// Budget of dense_rows_kernel<*, 8, 2, 4, false>: 128 threads, 176 registers; HMMA LDG.128
// Budget of dense_rows_kernel<*, 1, 1, 8, true>: 256 threads, 128 registers; HMMA LDG.128 LDS.128
template <class T, int kRowTiles, int kColumnTiles, int kWarps, bool kNormed>
__global__ void __launch_bounds__(kWarps * 32)
    dense_rows_kernel(const void* x, Norm norm, const T* w, int m, int64_t k,
                      Epilogue<T> epilogue) {
  constexpr int kAhead = ahead_of(kRowTiles, kWarps);
  constexpr int kColumns = 16 * kColumnTiles, kRows = 8 * kRowTiles, kPitch = kColumns + 4;
  constexpr int kParts = parts_of(kWarps), kStep = kWarps * kChunk;
  PYENGINE_DYNAMIC_SHARED(memory);
  float* const sums = reinterpret_cast<float*>(memory);
  T* const normed = reinterpret_cast<T*>(memory + sizeof(float) * kParts * kRows * kPitch);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t column0 = int64_t{blockIdx.x} * kColumns;

  const T* rows_of_w[kColumnTiles][2];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t column = column0 + c * 16 + h * 8 + g;  // beyond the last: the last, not stored
      rows_of_w[c][h] = w + (column < epilogue.n ? column : epilogue.n - 1) * k + t * 8;
    }
  }
  const uint4 zero = {0, 0, 0, 0};
  uint4 weights[kAhead][kColumnTiles][2];
  auto fetch = [&](uint4(&to)[kColumnTiles][2], int64_t k0) {
    const bool in_k = k0 + t * 8 < k;  // k is a multiple of 8: all of them or none
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        to[c][h] = in_k ? *reinterpret_cast<const uint4*>(rows_of_w[c][h] + k0) : zero;
      }
    }
  };
  // Weights do not depend on the kernel before; x does.
#pragma unroll
  for (int u = 0; u < kAhead; ++u) fetch(weights[u], warp * kChunk + u * kStep);
  const int column = thread % kColumns;  // of this thread's results
  const bool has_column = column0 + column < epilogue.n;
  const float bias = has_column ? epilogue.bias_of(column0 + column) : 0.0f;
  if constexpr (kNormed) prefetch_norm(norm, static_cast<int>(k), thread, kWarps * 32);
  start_after_previous();

  const int pitch = kNormed ? norm_pitch(k) : 0;
  if constexpr (kNormed) {
    if (warp < m) {
      normalise_row<norm_vectors(kNormedChannels)>(
          static_cast<const float*>(x) + warp * k, static_cast<int>(k), norm, lane,
          [&](int c, const float (&v)[8]) { store8(normed + warp * pitch + c, v); });
    }
    __syncthreads();
  }
  const T* rows_of_x[kRowTiles];
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    const int row = 8 * j + g < m ? 8 * j + g : m - 1;  // beyond the last: the last, not stored
    rows_of_x[j] = (kNormed ? normed + row * pitch : static_cast<const T*>(x) + row * k) + t * 8;
  }

  float sum[kColumnTiles][kRowTiles][4] = {};
  for (int64_t first = warp * kChunk; first < k; first += kAhead * kStep) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t k0 = first + u * kStep;  // beyond K: zeros, so that no branch holds loads back
      const bool in_k = k0 + t * 8 < k;
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        const uint4 b = in_k ? *reinterpret_cast<const uint4*>(rows_of_x[j] + k0) : zero;
        const uint32_t low[2] = {b.x, b.y}, high[2] = {b.z, b.w};
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          const uint4 upper = weights[u][c][0], lower = weights[u][c][1];
          const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
          const uint32_t a_high[4] = {upper.z, lower.z, upper.w, lower.w};
          mma<T>(sum[c][j], a, low);
          mma<T>(sum[c][j], a_high, high);
        }
      }
      fetch(weights[u], k0 + kAhead * kStep);
    }
  }
  // f(sum, place) for all sums of this lane
  auto over_sums = [&](auto&& f) {
    const int part = warp % kParts;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 8 * j + 2 * t + e % 2, at = 16 * c + g + e / 2 * 8;
          f(sum[c][j][e], sums[(part * kRows + row) * kPitch + at]);
        }
      }
    }
  };
  if constexpr (kWarps > kParts) {
    static_assert(kWarps == 2 * kParts, "pairs of warps");
    if (warp >= kParts) over_sums([](float mine, float& place) { place = mine; });
    __syncthreads();
    if (warp < kParts) over_sums([](float mine, float& place) { place += mine; });
  } else {
    over_sums([](float mine, float& place) { place = mine; });
  }
  __syncthreads();
  if (!has_column) return;
  for (int row = thread / kColumns; row < m; row += kWarps * 32 / kColumns) {
    float total = 0;
#pragma unroll
    for (int v = 0; v < kParts; ++v) total += sums[(v * kRows + row) * kPitch + column];
    epilogue.finish(row, column0 + column, total + bias);
  }
}

template <class T, int kRowTiles, class Cut, bool kNormed = false>
void run(Stream& stream, const void* x, const Norm& norm, int m, const Dense& layer,
         const Epilogue<T>& epilogue) {
  constexpr int kColumns = 16 * Cut::kColumnTiles;
  const size_t shared = sizeof(float) * parts_of(Cut::kWarps) * 8 * kRowTiles * (kColumns + 4) +
                        (kNormed ? sizeof(T) * m * norm_pitch(layer.k) : 0);
  launch("dense_rows", stream,
         dense_rows_kernel<T, kRowTiles, Cut::kColumnTiles, Cut::kWarps, kNormed>,
         blocks_of(layer.n, kColumns), Cut::kWarps * 32, shared, x, norm,
         static_cast<const T*>(layer.weight), m, layer.k, epilogue);
}

template <class T, class Cut>
void by_rows(Stream& stream, const void* x, int m, const Dense& layer,
             const Epilogue<T>& epilogue) {
  if (m > 32) return run<T, 8, Cut>(stream, x, Norm(), m, layer, epilogue);
  if (m > 16) return run<T, 4, Cut>(stream, x, Norm(), m, layer, epilogue);
  if (m > 8) return run<T, 2, Cut>(stream, x, Norm(), m, layer, epilogue);
  run<T, 1, Cut>(stream, x, Norm(), m, layer, epilogue);
}

}  // namespace

template <class T>
void dense_rows(Stream& stream, const void* x, const Norm* norm, int num_rows, const Dense& layer,
                const Epilogue<T>& epilogue) {
  if (norm != nullptr) return run<T, 1, Usual, true>(stream, x, *norm, num_rows, layer, epilogue);
  if (layer.n >= kWide) return by_rows<T, Wide>(stream, x, num_rows, layer, epilogue);
  if (layer.k >= kLong) return by_rows<T, Long>(stream, x, num_rows, layer, epilogue);
  by_rows<T, Usual>(stream, x, num_rows, layer, epilogue);
}

template void dense_rows<f16>(Stream&, const void*, const Norm*, int, const Dense&,
                              const Epilogue<f16>&);
template void dense_rows<bf16>(Stream&, const void*, const Norm*, int, const Dense&,
                               const Epilogue<bf16>&);

}  // namespace pyengine::cuda

// Dense layers y = x w^T. Few rows (decoding) are bound by reading the weights, many by arithmetic.
// In float16 and bfloat16 few rows are csrc/cuda/dense_rows.cu's.
#include "cuda/blas.h"
#include "cuda/dense.cuh"
#include "cuda/tensor_core.h"

namespace pyengine::cuda {

namespace {

// float32, one to eight rows: a warp per output column, whose weights its lanes read 8 at a time,
// 256 in a row. A row's sum has the same order whatever the number of rows.
// For `rows` or fewer: m of them.
// Budget of gemv_f32_kernel<[12]>: 128 threads, 72 registers; LDG.128
// Budget of gemv_f32_kernel<4>: 128 threads, 80 registers; LDG.128
// Budget of gemv_f32_kernel<8>: 128 threads, 128 registers; LDG.128
// Blocks per multiprocessor: as many as leave the registers that so many rows need.
constexpr int gemv_blocks(int rows) { return rows <= 2 ? 7 : rows == 4 ? 6 : 4; }
template <int rows>
__global__ void __launch_bounds__(128, gemv_blocks(rows))
    gemv_f32_kernel(const float* x, const float* w, int m, int64_t k, Epilogue<float> epilogue) {
  start_after_previous();
  const int64_t column = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (column >= epilogue.n) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* weights = w + column * k;
  float sum[rows] = {};
  for (int64_t i = lane * 8; i < k; i += 256) {
    float a[8];
    load8(weights + i, a);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float b[8];
      load8(x + (r < m ? r : m - 1) * k + i, b);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[r] += a[j] * b[j];
    }
  }
  float mine = 0;  // lane r's is row r's
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const float total = warp_sum(sum[r]);
    if (lane == r) mine = total;
  }
  if (lane < m) epilogue.store(lane, column, mine);
}

// float32: tiles of 64 rows by 64 columns, 16 sums per thread; k in chains of 256 that are added in
// order, which is as accurate as the CPU.
// Budget of gemm_f32_kernel: 256 threads, 80 registers, 8704 bytes shared; LDG.128 LDS.128
constexpr int kTile = 64, kDepth = 16;
__global__ void __launch_bounds__(256) gemm_f32_kernel(const float* x, const float* w, int64_t m,
                                                       int64_t k, Epilogue<float> epilogue) {
  start_after_previous();
  PYENGINE_SHARED(xs, float[kDepth][kTile + 4]);
  PYENGINE_SHARED(ws, float[kDepth][kTile + 4]);
  const int64_t row0 = int64_t{blockIdx.y} * kTile, column0 = int64_t{blockIdx.x} * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int load_row = thread / 4, load_k = thread % 4 * 4;
  const int ty = thread / 16, tx = thread % 16;
  float total[4][4] = {}, sum[4][4] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const float4 zero = {0, 0, 0, 0};
    const bool in_k = k0 + load_k < k;  // k is a multiple of 8: all four or none
    const float4 a = in_k && row0 + load_row < m
                         ? *reinterpret_cast<const float4*>(x + (row0 + load_row) * k + k0 + load_k)
                         : zero;
    const float4 b =
        in_k && column0 + load_row < epilogue.n
            ? *reinterpret_cast<const float4*>(w + (column0 + load_row) * k + k0 + load_k)
            : zero;
    xs[load_k][load_row] = a.x, xs[load_k + 1][load_row] = a.y;
    xs[load_k + 2][load_row] = a.z, xs[load_k + 3][load_row] = a.w;
    ws[load_k][load_row] = b.x, ws[load_k + 1][load_row] = b.y;
    ws[load_k + 2][load_row] = b.z, ws[load_k + 3][load_row] = b.w;
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const float4 u = *reinterpret_cast<const float4*>(&xs[d][ty * 4]);
      const float4 v = *reinterpret_cast<const float4*>(&ws[d][tx * 4]);
      const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += us[i] * vs[j];
      }
    }
    __syncthreads();
    if ((k0 + kDepth) % ops::kReductionBlock == 0 || k0 + kDepth >= k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[i][j] += sum[i][j];
          sum[i][j] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
      if (row < m && column < epilogue.n) epilogue.store(row, column, total[i][j]);
    }
  }
}

// float16 and bfloat16 on tensor cores, float32 sums. A block computes kRows x kColumns outputs
// with 2 x (warps / 2) warps; tiles of 32 k's come to shared memory by asynchronous copies, two
// ahead. A row of a tile is padded from 64 to 80 bytes: eight rows then lie in 32 different banks.
// Budget of gemm_kernel<*, 64, 64, 4>: 128 threads, 128 registers; HMMA LDSM LDGSTS.128
// Budget of gemm_kernel<*, 128, 128, 8>: 256 threads, 128 registers; HMMA LDSM LDGSTS.128
// Budget of gemm_kernel<*, 128, 128, 8> on 75: 256 threads, 136 registers; HMMA LDSM
constexpr int kStages = 3, kTileK = 32, kPitch = kTileK + 8, kStagedPitch = 32 + 4;
template <class T, int kRows, int kColumns, int kWarps>
__global__ void __launch_bounds__(kWarps * 32)
    gemm_kernel(const T* x, const T* w, int64_t m, int64_t k, Epilogue<T> epilogue) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / (kWarps / 2);
  constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;
  constexpr int kStage = (kRows + kColumns) * kPitch;
  start_after_previous();
  PYENGINE_DYNAMIC_SHARED(memory);
  T* const tiles = reinterpret_cast<T*>(memory);
  const int64_t row0 = int64_t{blockIdx.y} * kRows, column0 = int64_t{blockIdx.x} * kColumns;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;

  auto load = [&](int64_t step) {
    T* const stage = tiles + step % kStages * kStage;
    const int64_t k0 = step * kTileK;
    for (int i = thread; i < (kRows + kColumns) * (kTileK / 8); i += kThreads) {
      const int row = i / (kTileK / 8), at = i % (kTileK / 8) * 8;
      const bool is_x = row < kRows;
      const int64_t from = is_x ? row0 + row : column0 + row - kRows;
      const bool valid = from < (is_x ? m : epilogue.n) && k0 + at < k;
      const T* source = is_x ? x : w;
      copy_async(stage + row * kPitch + at, valid ? source + from * k + k0 + at : source, valid);
    }
  };
  const int64_t steps = (k + kTileK - 1) / kTileK;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s);
    copy_async_commit();
  }
  float sum[kM][kN][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one that is overwritten next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    copy_async_commit();
    const T* const xs = tiles + step % kStages * kStage;
    const T* const ws = xs + kRows * kPitch;
#pragma unroll
    for (int d = 0; d < kTileK; d += 16) {
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        ldmatrix4(a[i], xs + (warp_row + i * 16 + lane % 16) * kPitch + d + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        const int row = warp_column + j * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix4(b[j], ws + row * kPitch + d + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const uint32_t two[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(sum[i][j], a[i], two);
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // nobody reads the tiles any more
  // 16 rows at a time go through shared memory, so that a warp stores whole rows of its columns.
  static_assert(kWarpColumns == 32, "a lane per column");
  float* const staged = reinterpret_cast<float*>(memory) + warp * 16 * kStagedPitch;
  const int64_t column = column0 + warp_column + lane;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        staged[(lane / 4 + e / 2 * 8) * kStagedPitch + j * 8 + lane % 4 * 2 + e % 2] = sum[i][j][e];
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < 16; ++r) {
      const int64_t row = row0 + warp_row + i * 16 + r;
      if (row < m && column < epilogue.n)
        epilogue.store(row, column, staged[r * kStagedPitch + lane]);
    }
    __syncwarp();
  }
}

template <int rows>
void gemv(Stream& stream, const float* x, int m, const Dense& layer,
          const Epilogue<float>& epilogue) {
  launch("gemv_f32", stream, gemv_f32_kernel<rows>, blocks_of(layer.n, 4), 128, 0, x,
         static_cast<const float*>(layer.weight), m, layer.k, epilogue);
}

template <class T, int kRows, int kColumns, int kWarps>
void gemm(Stream& stream, const T* x, int m, const Dense& layer, const Epilogue<T>& epilogue) {
  launch("gemm", stream, gemm_kernel<T, kRows, kColumns, kWarps>,
         dim3(blocks_of(layer.n, kColumns), blocks_of(m, kRows)), kWarps * 32,
         kStages * (kRows + kColumns) * kPitch * sizeof(T), x, static_cast<const T*>(layer.weight),
         int64_t{m}, layer.k, epilogue);
}

void compute(Stream& stream, const float* x, int m, const Dense& layer,
             const Epilogue<float>& epilogue) {
  if (m > kFewRowsF32) {
    return launch("gemm_f32", stream, gemm_f32_kernel,
                  dim3(blocks_of(layer.n, kTile), blocks_of(m, kTile)), 256, 0, x,
                  static_cast<const float*>(layer.weight), int64_t{m}, layer.k, epilogue);
  }
  if (m > 4) return gemv<8>(stream, x, m, layer, epilogue);
  if (m > 2) return gemv<4>(stream, x, m, layer, epilogue);
  if (m > 1) return gemv<2>(stream, x, m, layer, epilogue);
  gemv<1>(stream, x, m, layer, epilogue);
}

template <class T>
void compute(Stream& stream, const T* x, int m, const Dense& layer, const Epilogue<T>& epilogue) {
  if (m <= kFewRows) return dense_rows(stream, x, nullptr, m, layer, epilogue);
  // Small products are cut finer, so that more multiprocessors have something to do.
  if (m > 128) return gemm<T, 128, 128, 8>(stream, x, m, layer, epilogue);
  gemm<T, 64, 64, 4>(stream, x, m, layer, epilogue);
}

}  // namespace

void dense(Stream& stream, Blas* blas, const void* x, DType act, int num_rows, const Dense& layer,
           const DenseResult& result) {
  if (layer.weight == nullptr) {
    return with_type(act, [&](auto tag) {
      using T = typename decltype(tag)::type;
      dense_quantized(stream, static_cast<const T*>(x), num_rows, layer.quantized,
                      Epilogue<T>(layer, result));
    });
  }
  // The odd vocabulary of GPT-2 leaves cuBLASLt no wide access: on an H200 it takes 1.2 to 1.9
  // times as long for the head as the kernels here.
  const int ours = act == DType::f32 ? kFewRowsF32 : kFewRowsBlas;
  if (blas != nullptr && num_rows > ours && layer.n < kWide) {
    if (Blas::can(result, act)) return blas->dense(stream, x, act, num_rows, layer, result);
    if (result.output == Output::qkv) {
      DenseResult all = result;
      all.output = Output::act;
      blas->dense(stream, x, act, num_rows, layer, all);
      return write_kv(stream, result.out, act, result.tokens, result.cache);
    }
  }
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    compute(stream, static_cast<const T*>(x), num_rows, layer, Epilogue<T>(layer, result));
  });
}

void dense_of_norm(Stream& stream, Blas* blas, const float* x, const Norm& norm, void* normed,
                   DType act, int num_rows, const Dense& layer, const DenseResult& result) {
  const bool at_once = num_rows <= kNormedRows && layer.k <= kNormedChannels && layer.n < kWide;
  if (!at_once || act == DType::f32 || layer.weight == nullptr) {
    layer_norm(stream, x, nullptr, num_rows, static_cast<int>(layer.k), norm, normed, act);
    return dense(stream, blas, normed, act, num_rows, layer, result);
  }
  with_type(act, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      dense_rows(stream, x, &norm, num_rows, layer, Epilogue<T>(layer, result));
    }
  });
}

}  // namespace pyengine::cuda

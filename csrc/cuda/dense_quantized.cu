// Dense layers of int8 and int4 weights, y = scale (x integers): the integers become numbers of the
// activations' type in registers, which is exact, and the scale of a column is applied to its sum.
//
// On tensor cores a product is transposed: the 16 columns of a piece are the rows of an mma's first
// operand, eight rows of x its second. Lane 4 g + t then has columns g and g + 8 of the weights and
// row g of x, and which k's its four pairs are may be chosen freely: eight neighbours for two
// products, so that it reads 16 bytes of x as they lie.
#include "cuda/dense.cuh"
#include "cuda/quantized.cuh"
#include "cuda/tensor_core.h"

namespace pyengine::cuda {

namespace {

// The first operands of two products: k's 8 t to 8 t + 3, and the four after them.
template <class T, class Half>
__device__ inline void fragments(const Half& half, uint32_t (&a)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t pairs[4];
    half.column[h].template pairs<T>(pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + h] = pairs[i];
  }
}

// Up to 32 rows (decoding), bound by reading the weights. A block per 16 columns; its warps take
// the pieces along k in turn, and their sums are added in order. Weights and inputs of the pieces
// that come next are on their way while one is multiplied, 2 kB of weights for each warp at one
// row: 48 blocks of eight are 0.8 MB.
constexpr int kFewWarps = 8, kSumPitch = kPieceColumns + 4;  // rows 2 t are in different banks

// A thread's column of the results, whose scale and bias do not depend on the kernel before.
template <class T>
struct FewResults {
  int64_t column;
  bool is_there;
  float scale = 0, bias = 0;

  __device__ FewResults(const QuantizedMatrix& w, const Epilogue<T>& epilogue)
      : column(int64_t{blockIdx.x} * kPieceColumns + threadIdx.x % kPieceColumns),
        is_there(column < w.n) {
    if (!is_there) return;
    scale = w.scale[column];
    bias = epilogue.bias_of(column);
  }

  // sums[warp][row][column]: added, and finished.
  template <int rows>
  __device__ void finish(const float (&sums)[kFewWarps][rows][kSumPitch], int64_t row0, int m,
                         const Epilogue<T>& epilogue) const {
    __syncthreads();
    if (!is_there) return;
    const int thread = static_cast<int>(threadIdx.x), c = thread % kPieceColumns;
    for (int row = thread / kPieceColumns; row < m; row += kFewWarps * 32 / kPieceColumns) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kFewWarps; ++warp) total += sums[warp][row][c];
      epilogue.finish(row0 + row, column, total * scale + bias);
    }
  }
};

// For 8 kTiles rows or fewer: m of them.
// Budget of few_quantized_kernel<*, 1>: 256 threads, 96 registers, 5120 bytes shared; HMMA LDG.128
// Budget of few_quantized_kernel<*, 2>: 256 threads, 96 registers, 10240 bytes shared; HMMA LDG.128
// Budget of few_quantized_kernel<*, 4>: 256 threads, 128 registers, 20480 bytes shared; HMMA
template <class T, class Integers, int kTiles>
__global__ void __launch_bounds__(kFewWarps * 32, 2)
    few_quantized_kernel(const T* x, QuantizedMatrix w, int m, Epilogue<T> epilogue) {
  constexpr int kAhead = kTiles > 1 ? 2 : 2048 / Integers::kBytes;
  PYENGINE_SHARED(sums, float[kFewWarps][8 * kTiles][kSumPitch]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int pieces = pieces_along_k(w);
  const int64_t first = int64_t{blockIdx.x} * pieces;

  Integers weights[kAhead];
  uint4 inputs[kAhead][kTiles][2];
  auto load_weights = [&](int slot, int piece) {
    if (piece >= pieces) return;
    weights[slot].load(integers_at<Integers>(w, first + piece),
                       groups_at<Integers>(w, first + piece), lane);
  };
  auto load_inputs = [&](int slot, int piece) {
    if (piece >= pieces) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = 8 * i + g, k = int64_t{piece} * kPieceDepth + 32 * j + 8 * t;
        inputs[slot][i][j] = row < m && k < w.k ? *reinterpret_cast<const uint4*>(x + row * w.k + k)
                                                : uint4{0, 0, 0, 0};
      }
    }
  };
  // The weights do not depend on the kernel before; x does.
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load_weights(slot, warp + slot * kFewWarps);
  const FewResults<T> results(w, epilogue);
  start_after_previous();
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load_inputs(slot, warp + slot * kFewWarps);
  float sum[kTiles][4] = {};
  for (int begin = warp; begin < pieces; begin += kAhead * kFewWarps) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      if (begin + slot * kFewWarps >= pieces) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t a[2][4];
        fragments<T>(weights[slot].half(j), a);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint4 v = inputs[slot][i][j];
          mma<T>(sum[i], a[0], {v.x, v.y});
          mma<T>(sum[i], a[1], {v.z, v.w});
        }
      }
      load_weights(slot, begin + (slot + kAhead) * kFewWarps);
      load_inputs(slot, begin + (slot + kAhead) * kFewWarps);
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][8 * i + 2 * t + e % 2][g + e / 2 * 8] = sum[i][e];
  }
  results.finish(sums, 0, m, epilogue);
}

// float32, any number of rows, kRows at a time: a lane has the columns and k's of its part of a
// piece, and chains of K / 32 products.
// Budget of quantized_f32_kernel<*, 1>: 256 threads, 64 registers, 640 bytes shared; LDG.128
// Budget of quantized_f32_kernel<*, 8>: 256 threads, 128 registers, 5120 bytes shared; LDG.128
template <class Integers, int kRows>
__global__ void __launch_bounds__(kFewWarps * 32)
    quantized_f32_kernel(const float* x, QuantizedMatrix w, int64_t m, Epilogue<float> epilogue) {
  PYENGINE_SHARED(sums, float[kFewWarps][kRows][kSumPitch]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int pieces = pieces_along_k(w);
  const int64_t first = int64_t{blockIdx.x} * pieces;
  const int64_t row0 = int64_t{blockIdx.y} * kRows, left = m - row0;
  const int rows = static_cast<int>(left < kRows ? left : kRows);
  const FewResults<float> results(w, epilogue);
  start_after_previous();
  float sum[kRows][2] = {};
  for (int piece = warp; piece < pieces; piece += kFewWarps) {
    Integers weights;
    weights.load(integers_at<Integers>(w, first + piece), groups_at<Integers>(w, first + piece),
                 lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t k = int64_t{piece} * kPieceDepth + 32 * j + 8 * t;
      if (k >= w.k) continue;
      float low[8], high[8];
      weights.half(j).column[0].floats(low);
      weights.half(j).column[1].floats(high);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float a[8];
        load8(x + (row0 + (r < rows ? r : rows - 1)) * w.k + k, a);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sum[r][0] += a[i] * low[i];
          sum[r][1] += a[i] * high[i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = warp_sum(sum[r][h], 4);
      if (t == 0) sums[warp][r][g + 8 * h] = total;
    }
  }
  results.finish(sums, row0, rows, epilogue);
}

// Many rows, on tensor cores: a block computes kRows x kColumns outputs with 2 x (warps / 2) warps.
// The next pieces of x and of the weights come to shared memory by asynchronous copies, the weights
// as integers. Of the eight 16-byte parts of a row of x, odd rows have the halves exchanged, so
// that the parts that eight lanes read of two rows lie in 32 different banks. Six warps
// instead of eight have the registers that they need, two blocks to a multiprocessor.
// Budget of many_quantized_kernel<*, 64, 64, 4, 4>: 128 threads, 128 registers; HMMA LDGSTS.128
// Budget of many_quantized_kernel<*, 128, 96, 6, 2>: 192 threads, 168 registers; HMMA LDGSTS.128
constexpr int kOwnPitch = 32 + 4;  // of the sums of a warp: rows 2 t are in different banks
template <class Integers, int kRows, int kColumns>
constexpr int kStageBytes =
    kRows * kPieceDepth * 2 +
    kColumns / kPieceColumns * (Integers::kBytes + (Integers::kHasGroups ? kGroupBytes : 0));
template <class T, class Integers, int kRows, int kColumns, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 12 / kWarps)
    many_quantized_kernel(const T* x, QuantizedMatrix w, int m, Epilogue<T> epilogue) {
  constexpr int kThreads = kWarps * 32, kTiles = kColumns / kPieceColumns;
  constexpr int kRowBytes = kPieceDepth * 2, kParts = kRowBytes / 16;
  constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / (kWarps / 2);
  constexpr int kM = kWarpColumns / 16, kN = kWarpRows / 8;
  constexpr int kStage = kStageBytes<Integers, kRows, kColumns>;
  PYENGINE_DYNAMIC_SHARED(memory);
  const int row0 = static_cast<int>(blockIdx.y) * kRows;
  const int tile0 = static_cast<int>(blockIdx.x) * kTiles, pieces = pieces_along_k(w);
  const int k_end = static_cast<int>(w.k), n = static_cast<int>(w.n);
  const int last_tile = (n - 1) / kPieceColumns - tile0;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp % 2 * kWarpRows, warp_tile = warp / 2 * kM, swap = g % 2 * 4;

  // Rows and columns beyond the last are copies of it, and not stored. `size` bytes of the piece of
  // each tile of columns:
  auto load_tiles = [&](unsigned char* to, const uint8_t* from, int size, int piece) {
    for (int i = thread; i < kTiles * (size / 16); i += kThreads) {
      const int tile = i / (size / 16), at = i % (size / 16) * 16;
      const int source = tile < last_tile ? tile : last_tile;
      copy_async(to + tile * size + at, from + (source * pieces + piece) * size + at, true);
    }
  };
  auto load = [&](int piece) {
    unsigned char* const stage = memory + piece % kStages * kStage;
    const int part = thread % kParts, k = piece * kPieceDepth + part * 8;
    const int first = thread / kParts, last = m - 1 - row0;  // rows of the tile
    unsigned char* const to = stage + first * kRowBytes + (part ^ (first % 2 * 4)) * 16;
    const T* const from = x + int64_t{row0} * k_end + (k < k_end ? k : 0);
    for (int i = 0; first + i < kRows; i += kThreads / kParts) {
      const int row = first + i < last ? first + i : last;
      copy_async(to + i * kRowBytes, from + row * k_end, k < k_end);
    }
    unsigned char* const tiles = stage + kRows * kRowBytes;
    const int skipped = tile0 * pieces;
    load_tiles(tiles, w.integers + int64_t{skipped} * Integers::kBytes, Integers::kBytes, piece);
    if (Integers::kHasGroups) {
      load_tiles(tiles + kTiles * Integers::kBytes, w.groups + int64_t{skipped} * kGroupBytes,
                 kGroupBytes, piece);
    }
  };
  start_after_previous();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < pieces) load(s);
    copy_async_commit();
  }
  float sum[kM][kN][4] = {};
  for (int piece = 0; piece < pieces; ++piece) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there, and nobody reads the one that is overwritten next
    if (piece + kStages - 1 < pieces) load(piece + kStages - 1);
    copy_async_commit();
    const unsigned char* const xs = memory + piece % kStages * kStage;
    const unsigned char* const tiles = xs + kRows * kRowBytes;
    const unsigned char* const groups = tiles + kTiles * Integers::kBytes;
#pragma unroll 1  // twice the registers would not fit
    for (int j = 0; j < 2; ++j) {
      uint32_t a[kM][2][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const auto half = Integers::half(tiles + (warp_tile + i) * Integers::kBytes,
                                         groups + (warp_tile + i) * kGroupBytes, lane, j);
        fragments<T>(half, a[i]);
      }
      const unsigned char* const part = xs + (warp_row + g) * kRowBytes + ((4 * j + t) ^ swap) * 16;
#pragma unroll
      for (int r = 0; r < kN; ++r) {
        const uint4 v = *reinterpret_cast<const uint4*>(part + r * 8 * kRowBytes);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma<T>(sum[i][r], a[i][0], {v.x, v.y});
          mma<T>(sum[i][r], a[i][1], {v.z, v.w});
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // nobody reads a stage any more
  // By way of shared memory a lane gets a column: stores are whole lines, and there is one copy of
  // what finishes a sum.
  static_assert(kWarpColumns == 32 && kN % 4 == 0, "a lane per column, 32 rows at a time");
  float* const own = reinterpret_cast<float*>(memory) + warp * (32 * kOwnPitch);
  const int column = (tile0 + warp_tile) * kPieceColumns + lane;
  const float scale = column < n ? w.scale[column] : 0.0f;
  const float bias = column < n ? epilogue.bias_of(column) : 0.0f;
#pragma unroll
  for (int r0 = 0; r0 < kN; r0 += 4) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          own[(8 * r + 2 * t + e % 2) * kOwnPitch + 16 * i + g + e / 2 * 8] = sum[i][r0 + r][e];
        }
      }
    }
    __syncwarp();
    if (column >= n) continue;
#pragma unroll 1
    for (int r = 0; r < 32; r += 4) {
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = own[(r + i) * kOwnPitch + lane] * scale + bias;
      epilogue.finish_rows(row0 + warp_row + r0 * 8 + r, m, column, sums);
    }
  }
}

template <class T, class Integers, int kTiles>
void few_rows(Stream& stream, const T* x, const QuantizedMatrix& w, int m,
              const Epilogue<T>& epilogue) {
  launch("few_quantized", stream, few_quantized_kernel<T, Integers, kTiles>,
         blocks_of(w.n, kPieceColumns), kFewWarps * 32, 0, x, w, m, epilogue);
}

template <class T, class Integers, int kRows, int kColumns, int kWarps, int kStages>
void many_rows(Stream& stream, const T* x, const QuantizedMatrix& w, int m,
               const Epilogue<T>& epilogue) {
  launch("many_quantized", stream,
         many_quantized_kernel<T, Integers, kRows, kColumns, kWarps, kStages>,
         dim3(blocks_of(w.n, kColumns), blocks_of(m, kRows)), kWarps * 32,
         kStages * kStageBytes<Integers, kRows, kColumns>, x, w, m, epilogue);
}

template <class Integers, int kRows>
void rows_f32(Stream& stream, const float* x, const QuantizedMatrix& w, int64_t m,
              const Epilogue<float>& epilogue) {
  launch("quantized_f32", stream, quantized_f32_kernel<Integers, kRows>,
         dim3(blocks_of(w.n, kPieceColumns), blocks_of(m, kRows)), kFewWarps * 32, 0, x, w, m,
         epilogue);
}

template <class Integers>
void product(Stream& stream, const float* x, const QuantizedMatrix& w, int m,
             const Epilogue<float>& epilogue) {
  if (m > 1) return rows_f32<Integers, 8>(stream, x, w, m, epilogue);
  rows_f32<Integers, 1>(stream, x, w, m, epilogue);
}
template <class Integers, class T>
void product(Stream& stream, const T* x, const QuantizedMatrix& w, int m,
             const Epilogue<T>& epilogue) {
  // Two stages of large tiles take long enough for a piece to arrive; small ones want four.
  if (m > 128) return many_rows<T, Integers, 128, 96, 6, 2>(stream, x, w, m, epilogue);
  if (m > kFewQuantizedRows) {
    return many_rows<T, Integers, 64, 64, 4, 4>(stream, x, w, m, epilogue);
  }
  if (m > 16) return few_rows<T, Integers, 4>(stream, x, w, m, epilogue);
  if (m > 8) return few_rows<T, Integers, 2>(stream, x, w, m, epilogue);
  few_rows<T, Integers, 1>(stream, x, w, m, epilogue);
}

}  // namespace

template <class T>
void dense_quantized(Stream& stream, const T* x, int num_rows, const QuantizedMatrix& w,
                     const Epilogue<T>& epilogue) {
  with_integers(w, [&](auto integers) {
    product<typename decltype(integers)::type>(stream, x, w, num_rows, epilogue);
  });
}

template void dense_quantized<float>(Stream&, const float*, int, const QuantizedMatrix&,
                                     const Epilogue<float>&);
template void dense_quantized<f16>(Stream&, const f16*, int, const QuantizedMatrix&,
                                   const Epilogue<f16>&);
template void dense_quantized<bf16>(Stream&, const bf16*, int, const QuantizedMatrix&,
                                    const Epilogue<bf16>&);

}  // namespace pyengine::cuda

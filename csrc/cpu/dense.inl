// Dense layers: y = x w, every element reduced in the one order of ops.h, whatever the number of
// rows.
//
// Lanes always run over output columns, so an element is one lane's chain over k: 256 k's from
// zero, then added to the sum of the blocks before. Three ways to feed the lanes give the same
// bits:
//   strips   one row, (K, N) weights: streamed as they lie, a strip of columns at a time
//   turned   few rows, (N, K) weights: squares of kLanes x kLanes words are transposed in registers
//   panels   otherwise: [block of k][panel width] copies in scratch, multiplied by tiles of rows
//
// A `Layer` (dense_f32.inl, dense_bf16.inl) says what a 32-bit word of x and of a panel holds:
//   f32                    one element
//   bf16 without dot       one element widened to f32, each pair of k's swapped (the odd one first)
//   bf16 with dot          the pair (k, k + 1)

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kPanel = kTileVectors * kLanes;  // columns of a panel

constexpr int64_t kRowsAhead = 8;  // rows of (K, N) weights to prefetch while one is read

static_assert(kMaxItemColumns % kPanel == 0, "an item is whole panels");
static_assert(kMaxItemColumns % (2 * kLanes) == 0, "and whole strips");

PYENGINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYENGINE_INLINE Vf load_upto(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load(p, static_cast<int>(n));
}
PYENGINE_INLINE void store_upto(float* p, Vf a, int64_t n) {
  if (n >= kLanes) {
    store(p, a);
  } else {
    store(p, a, static_cast<int>(n));
  }
}
PYENGINE_INLINE void store_bf16_upto(uint16_t* p, Vf a, int64_t n) {
  if (n >= kLanes) {
    store_bf16(p, a);
  } else {
    store_bf16(p, a, static_cast<int>(n));
  }
}

// ---- Epilogue ---------------------------------------------------------------------------------

template <class F>
PYENGINE_INLINE void activate(float* y, const float* bias, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vf v = load(y + i);  // y is padded to whole vectors
    if (bias != nullptr) v = add(v, load_upto(bias + i, n - i));
    store(y + i, f(v));
  }
}

PYENGINE_INLINE void copy_bf16(const float* y, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_bf16_upto(out + i, load_upto(y + i, n - i), n - i);
}
PYENGINE_INLINE void copy_f32(const float* y, int64_t n, float* out) {
  __builtin_memcpy(out, y, static_cast<size_t>(n) * sizeof(float));
}

// Channels [d0, d0 + n) of a head's key to its place in a bf16 block (kv/layout.h).
static void scatter_key_bf16(const float* y, int64_t d0, int64_t n, int64_t head_dim,
                             uint16_t* key) {
  uint16_t halves[kMaxHeadDim] = {};
  copy_bf16(y, n, halves);
  int64_t i = 0;
  if (d0 % 2 != 0) key[d0 / 2 * 32 + 1] = halves[i++];  // its pair is another item's
  for (; i + 1 < n; i += 2) __builtin_memcpy(key + (d0 + i) / 2 * 32, halves + i, 4);
  if (i == n) return;
  key[(d0 + i) / 2 * 32] = halves[i];
  if (d0 + i + 1 == head_dim) key[(d0 + i) / 2 * 32 + 1] = 0;
}

// Columns [col, col + n) of one row of q | k | v to the query buffer and the cache (kv/layout.h).
static void scatter_qkv(const DenseJob& j, int64_t row, int64_t col, int64_t n, const float* y) {
  const KVMemory& kv = j.kv;
  const int64_t channels = j.out_features / 3, slot = j.kv_slot[row] % 16;
  char* block = kv.data + j.kv_slot[row] / 16 * kv.block_bytes;
  while (n > 0) {
    const int64_t part = col / channels, channel = col % channels;
    int64_t count;
    if (part == 0) {
      count = smaller(n, channels - channel);
      copy_f32(y, count, static_cast<float*>(j.out) + row * j.out_stride + channel);
    } else {
      const int64_t head = channel / kv.head_dim, d0 = channel % kv.head_dim;
      count = smaller(n, kv.head_dim - d0);
      char* key = block + head * kv.key_bytes;
      char* value = block + kv.values_at + head * kv.value_bytes;
      if (part == 1 && kv.dtype == DType::bf16) {
        scatter_key_bf16(y, d0, count, kv.head_dim, reinterpret_cast<uint16_t*>(key) + slot * 2);
      } else if (part == 1) {
        float* to = reinterpret_cast<float*>(key) + d0 * 16 + slot;
        for (int64_t i = 0; i < count; ++i) to[i * 16] = y[i];
      } else if (kv.dtype == DType::bf16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(value) + (slot / 2 * kv.head_dim_v + d0) * 2;
        for (int64_t i = 0; i < count; i += kLanes) {
          const int64_t lanes = smaller(count - i, kLanes);
          store_half(to + 2 * i, load_upto(y + i, lanes), static_cast<int>(lanes), slot % 2);
        }
      } else {
        copy_f32(y, count, reinterpret_cast<float*>(value) + slot * kv.head_dim_v + d0);
      }
    }
    col += count;
    y += count;
    n -= count;
  }
}

// y holds columns [col, col + n) of x w for one row, padded to whole vectors.
static void finish_row(const DenseJob& j, int64_t row, int64_t col, int64_t n, float* y) {
  const float* bias = j.bias != nullptr ? j.bias + col : nullptr;
  switch (j.activation) {
    case ops::Activation::none:
      if (bias != nullptr)
        activate(y, bias, n, [](Vf v) __attribute__((always_inline)) { return v; });
      break;
    case ops::Activation::gelu_tanh:
      activate(y, bias, n, [](Vf v) __attribute__((always_inline)) { return gelu_tanh(v); });
      break;
    case ops::Activation::gelu_erf:
      activate(y, bias, n, [](Vf v) __attribute__((always_inline)) { return gelu_erf(v); });
      break;
    case ops::Activation::relu:
      activate(y, bias, n, [](Vf v) __attribute__((always_inline)) { return relu(v); });
      break;
    case ops::Activation::silu:
      activate(y, bias, n, [](Vf v) __attribute__((always_inline)) { return silu(v); });
      break;
  }
  const int64_t at = (row - j.out_row0) * j.out_stride + (col - j.out_col0);
  switch (j.store) {
    case Store::f32:
      copy_f32(y, n, static_cast<float*>(j.out) + at);
      break;
    case Store::bf16:
      copy_bf16(y, n, static_cast<uint16_t*>(j.out) + at);
      break;
    case Store::residual: {
      float* out = static_cast<float*>(j.out) + at;
      for (int64_t i = 0; i < n; i += kLanes) {
        store_upto(out + i, add(load_upto(out + i, n - i), load(y + i)), n - i);
      }
      break;
    }
    case Store::qkv:
      scatter_qkv(j, row, col, n, y);
      break;
  }
}

// ---- Panels -----------------------------------------------------------------------------------

// c[r][0, kPanel) (+)= one block's chain. x: kRows rows of `count` words, ldx apart.
template <class Layer, int kRows>
static void multiply_tile(const float* x, int64_t ldx, const float* panel, int64_t count, float* c,
                          int64_t ldc, bool first_block) {
  Vf acc[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) acc[r][v] = zero();
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k, panel += kPanel, ++x) {
    Vf w[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] = load(panel + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vf xr = set1(x[r * ldx]);
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Layer::multiply_add(acc[r][v], xr, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      float* p = c + r * ldc + v * kLanes;
      store(p, first_block ? acc[r][v] : add(load(p), acc[r][v]));
    }
  }
}

// The last rows of an item, fewer than a tile.
template <class Layer, int kRows>
static void multiply_rest(int64_t rows, const float* x, int64_t ldx, const float* panel,
                          int64_t count, float* c, int64_t ldc, bool first_block) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<Layer, kRows>(x, ldx, panel, count, c, ldc, first_block);
    } else {
      multiply_rest<Layer, kRows - 1>(rows, x, ldx, panel, count, c, ldc, first_block);
    }
  }
}

template <class Layer>
static void run_panels(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t cols,
                       float* scratch) {
  const int64_t rows = row1 - row0, words = Layer::words(j.in_features);
  const int64_t panels = (cols + kPanel - 1) / kPanel, ldc = panels * kPanel;
  float* c = scratch;
  float* packed = scratch + rows * ldc;
  const float* x = static_cast<const float*>(j.x) + row0 * j.x_stride;
  for (int64_t k0 = 0; k0 < words; k0 += Layer::kBlockWords) {
    const int64_t count = smaller(Layer::kBlockWords, words - k0);
    if (j.layout == ops::WeightLayout::in_out) {
      Layer::pack_in_out(j, k0, count, col0, cols, packed);
    } else {
      Layer::pack_out_in(j, k0, count, col0, cols, packed);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = packed + p * count * kPanel;
      int64_t r = 0;
      for (; r + kTileRows <= rows; r += kTileRows) {
        multiply_tile<Layer, kTileRows>(x + r * j.x_stride + k0, j.x_stride, panel, count,
                                        c + r * ldc + p * kPanel, ldc, k0 == 0);
      }
      multiply_rest<Layer, kTileRows - 1>(rows - r, x + r * j.x_stride + k0, j.x_stride, panel,
                                          count, c + r * ldc + p * kPanel, ldc, k0 == 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r) finish_row(j, row0 + r, col0, cols, c + r * ldc);
}

// ---- Turned -----------------------------------------------------------------------------------

constexpr int kTurnedRows = 4;

// y[r][0, kLanes) of kLanes columns from `col` on, of which N - col may be fewer.
template <class Layer, int kRows>
static void multiply_turned(const DenseJob& j, const float* x, int64_t col, float* y, int64_t ldy) {
  const int64_t weight_words = Layer::weight_words(j.in_features);
  constexpr int64_t kBlock = Layer::kBlockWords / Layer::kPanelRowsPerWord;
  const int64_t cols = smaller(kLanes, j.out_features - col);
  for (int64_t k0 = 0; k0 < weight_words; k0 += kBlock) {
    const int64_t end = smaller(k0 + kBlock, weight_words);
    Vf acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = zero();
    for (int64_t k = k0; k < end; k += kLanes) {
      Vf t[kLanes];
      Layer::load_square(j, col, cols, k, t);
      transpose(t);
      if (end - k >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            acc[r] = Layer::multiply_add_word(acc[r], x + r * j.x_stride, k + i, t[i]);
          }
        }
      } else {
        for (int i = 0; i < end - k; ++i) {
          for (int r = 0; r < kRows; ++r) {
            acc[r] = Layer::multiply_add_word(acc[r], x + r * j.x_stride, k + i, t[i]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* p = y + r * ldy;
      store(p, k0 == 0 ? acc[r] : add(load(p), acc[r]));
    }
  }
}

template <class Layer>
static void run_turned(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t cols,
                       float* scratch) {
  const float* x = static_cast<const float*>(j.x) + row0 * j.x_stride;
  const int64_t ldy = kMaxItemColumns;
  for (int64_t i = 0; i < cols; i += kLanes) {
    switch (row1 - row0) {
      case 1:
        multiply_turned<Layer, 1>(j, x, col0 + i, scratch + i, ldy);
        break;
      case 2:
        multiply_turned<Layer, 2>(j, x, col0 + i, scratch + i, ldy);
        break;
      case 3:
        multiply_turned<Layer, 3>(j, x, col0 + i, scratch + i, ldy);
        break;
      default:
        multiply_turned<Layer, 4>(j, x, col0 + i, scratch + i, ldy);
    }
  }
  for (int64_t r = row0; r < row1; ++r) finish_row(j, r, col0, cols, scratch + (r - row0) * ldy);
}

// ---- One item ---------------------------------------------------------------------------------

template <class Layer>
static int64_t scratch_floats(int64_t rows, int64_t cols) {
  const int64_t panels = (cols + kPanel - 1) / kPanel;
  const int64_t packed = panels * kPanel * (rows + Layer::kBlockWords);
  const int64_t unpacked = kTurnedRows * kMaxItemColumns;
  return packed > unpacked ? packed : unpacked;
}

template <class Layer>
static void run_dense(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                      float* scratch) {
  const int64_t rows = row1 - row0, cols = col1 - col0;
  if (rows == 1 && j.layout == ops::WeightLayout::in_out) {
    Layer::run_strips(j, static_cast<const float*>(j.x) + row0 * j.x_stride, col0, cols, scratch);
    finish_row(j, row0, col0, cols, scratch);
  } else if (rows <= kTurnedRows && j.layout == ops::WeightLayout::out_in) {
    run_turned<Layer>(j, row0, row1, col0, cols, scratch);
  } else {
    run_panels<Layer>(j, row0, row1, col0, cols, scratch);
  }
}

// (N, K) weights: squares of words, transposed, become kLanes columns of a panel.
template <class Layer>
static void pack_squares(const DenseJob& j, int64_t k0, int64_t count, int64_t col0, int64_t cols,
                         float* dst) {
  constexpr int64_t kRowsPerWord = Layer::kPanelRowsPerWord;
  const int64_t word0 = k0 / kRowsPerWord, words = count / kRowsPerWord;
  const int64_t padded = (cols + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i < padded; i += kLanes) {
    float* out = dst + i / kPanel * count * kPanel + i % kPanel;
    const int64_t valid = smaller(kLanes, cols - i);
    for (int64_t k = 0; k < words; k += kLanes) {
      Vf t[kLanes];
      if (valid <= 0) {
        for (int l = 0; l < kLanes; ++l) t[l] = zero();
      } else {
        Layer::load_square(j, col0 + i, valid, word0 + k, t);
        transpose(t);
      }
      const int64_t rows = smaller(kLanes, words - k);
      for (int64_t l = 0; l < rows; ++l) {
        Layer::store_panel_rows(out + (k + l) * kRowsPerWord * kPanel, t[l]);
      }
    }
  }
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The float32 `Layer` of dense.inl: a word is an element.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

// y[0, kLanes kVectors) of one row over K; the last vector has `last` columns.
template <int kVectors>
static void multiply_strip_f32(const float* x, const float* w, int64_t ldw, int64_t in_features,
                               float* y, int last = kLanes) {
  for (int64_t k0 = 0; k0 < in_features; k0 += ops::kReductionBlock) {
    const int64_t end = smaller(k0 + ops::kReductionBlock, in_features);
    Vf acc[kVectors];
#pragma GCC unroll 24
    for (int v = 0; v < kVectors; ++v) acc[v] = zero();
    for (int64_t k = k0; k < end; ++k) {
      const float* row = w + k * ldw;
      const Vf xk = set1(x[k]);
      if (kVectors == 1 && last < kLanes) {
        acc[0] = fma(xk, load(row, last), acc[0]);
        continue;
      }
#pragma GCC unroll 24
      for (int v = 0; v < kVectors; ++v) {
        acc[v] = fma(xk, load(row + v * kLanes), acc[v]);
        if (v * kLanes % 16 == 0) __builtin_prefetch(row + kRowsAhead * ldw + v * kLanes, 0, 2);
      }
    }
#pragma GCC unroll 24
    for (int v = 0; v < kVectors; ++v) {
      float* p = y + v * kLanes;
      store(p, k0 == 0 ? acc[v] : add(load(p), acc[v]));
    }
  }
}

struct LayerF32 {
  static constexpr int64_t kBlockWords = ops::kReductionBlock;
  static constexpr int64_t kPanelRowsPerWord = 1;

  static int64_t words(int64_t in_features) { return in_features; }
  static int64_t weight_words(int64_t in_features) { return in_features; }

  PYENGINE_INLINE Vf multiply_add(Vf acc, Vf x, Vf w) { return fma(x, w, acc); }
  PYENGINE_INLINE Vf multiply_add_word(Vf acc, const float* x, int64_t k, Vf w) {
    return fma(set1(x[k]), w, acc);
  }

  static void pack_in_out(const DenseJob& j, int64_t k0, int64_t count, int64_t col0, int64_t cols,
                          float* dst) {
    const int64_t full = cols / kPanel, rest = cols % kPanel;
    for (int64_t k = 0; k < count; ++k) {
      const float* row = static_cast<const float*>(j.w) + (k0 + k) * j.out_features + col0;
      float* out = dst + k * kPanel;
      for (int64_t p = 0; p < full; ++p, out += count * kPanel, row += kPanel) {
#pragma GCC unroll 3
        for (int v = 0; v < kTileVectors; ++v) {
          store(out + v * kLanes, load(row + v * kLanes));
          __builtin_prefetch(row + v * kLanes + kRowsAhead * j.out_features, 0, 2);
        }
      }
      if (rest > 0) {
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t n = rest - v * kLanes;
          store(out + v * kLanes, n > 0 ? load_upto(row + v * kLanes, n) : zero());
        }
      }
    }
  }

  // t[l] = words [k, k + kLanes) of column col + l's weights, zero outside the matrix.
  PYENGINE_INLINE void load_square(const DenseJob& j, int64_t col, int64_t cols, int64_t k, Vf* t) {
    const float* w = static_cast<const float*>(j.w) + col * j.in_features + k;
    const int64_t n = j.in_features - k;
    if (cols == kLanes && n >= kLanes) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        t[l] = load(w + l * j.in_features);
        __builtin_prefetch(w + (l + kLanes) * j.in_features, 0, 2);
      }
    } else {
      for (int l = 0; l < kLanes; ++l)
        t[l] = l < cols ? load_upto(w + l * j.in_features, n) : zero();
    }
  }

  PYENGINE_INLINE void store_panel_rows(float* out, Vf word) { store(out, word); }

  static void pack_out_in(const DenseJob& j, int64_t k0, int64_t count, int64_t col0, int64_t cols,
                          float* dst) {
    pack_squares<LayerF32>(j, k0, count, col0, cols, dst);
  }

  static void run_strips(const DenseJob& j, const float* x, int64_t col0, int64_t cols, float* y) {
    const int64_t ldw = j.out_features;
    const float* w = static_cast<const float*>(j.w) + col0;
    int64_t i = 0;
    for (; cols - i >= kStripVectors * kLanes; i += kStripVectors * kLanes) {
      multiply_strip_f32<kStripVectors>(x, w + i, ldw, j.in_features, y + i);
    }
    for (; cols - i >= kStripVectors / 2 * kLanes; i += kStripVectors / 2 * kLanes) {
      multiply_strip_f32<kStripVectors / 2>(x, w + i, ldw, j.in_features, y + i);
    }
    for (; cols - i >= 3 * kLanes; i += 3 * kLanes) {
      multiply_strip_f32<3>(x, w + i, ldw, j.in_features, y + i);
    }
    for (; i < cols; i += kLanes) {
      const int last = static_cast<int>(smaller(cols - i, kLanes));
      multiply_strip_f32<1>(x, w + i, ldw, j.in_features, y + i, last);
    }
  }
};

static int64_t prepared_words_f32(int64_t) { return 0; }
static void prepare_f32(const void*, int64_t, int64_t, void*) {}

constexpr DenseKernels kDenseF32 = {prepared_words_f32, prepare_f32, scratch_floats<LayerF32>,
                                    run_dense<LayerF32>, kPanel};

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

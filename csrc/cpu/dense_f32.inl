// The float32 `Layer` of dense.inl: a word is an element.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

struct LayerF32 {
  static constexpr int64_t kBlockWords = ops::kReductionBlock;
  static constexpr int64_t kInputsPerWord = 1;  // floats of x

  static int64_t words(int64_t in_features) { return in_features; }

  template <int kRows>
  PYENGINE_INLINE void multiply_add(Vf (&acc)[kRows][kTileVectors], const float* x, int64_t ldx,
                                    const Vf* w) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vf xr = set1(x[r * ldx]);
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = fma(xr, w[v], acc[r][v]);
    }
  }

  // See DenseKernels::pack.
  static void pack_in_out(const DenseJob& j, int64_t word0, int64_t words, int64_t col0,
                          int64_t cols, float* dst, int64_t tile_words) {
    const int64_t ldw = j.out_features;
    for (int64_t k = 0; k < words; ++k) {
      const float* row = static_cast<const float*>(j.w) + (word0 + k) * ldw + col0;
      float* out = dst + k * kTile;
      for (int64_t i = 0; i < cols; i += kTile, out += tile_words * kTile) {
        const int64_t valid = ldw - (col0 + i);
        for (int64_t v = 0; v < kTile; v += kLanes) {
          store(out + v, valid >= kTile ? load(row + i + v)
                         : valid > v    ? load_upto(row + i + v, valid - v)
                                        : zero());
        }
        __builtin_prefetch(row + i + kRowsAhead * ldw, 0, 2);
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
};

static int64_t prepared_words_f32(int64_t) { return 0; }
static void prepare_f32(const void*, int64_t, int64_t, void*) {}

constexpr DenseKernels kDenseF32 = {prepared_words_f32,  prepare_f32,    scratch_floats<LayerF32>,
                                    run_dense<LayerF32>, pack<LayerF32>, kItemColumns};

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

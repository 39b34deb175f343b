// The bfloat16 `Layer` of dense.inl: a word is the pair (k, k + 1), and adds
// fma(x[k], w[k], fma(x[k + 1], w[k + 1], s)). An odd K gets one more k of zeros.
//
// With PYENGINE_DOT_PAIRS (AVX-512 BF16) one instruction does both steps on pairs of x. Without, x
// is widened to float32.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

struct LayerBf16 {
  static constexpr int64_t kBlockWords = ops::kReductionBlock / 2;

  static int64_t words(int64_t in_features) { return (in_features + 1) / 2; }

#if defined(PYENGINE_DOT_PAIRS)
  static constexpr int64_t kInputsPerWord = 1;
  template <int kRows>
  PYENGINE_INLINE void multiply_add(Vf (&acc)[kRows][kTileVectors], const float* x, int64_t ldx,
                                    const Vf* w) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vf xr = set1(x[r * ldx]);
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = dot_pairs(acc[r][v], xr, w[v]);
    }
  }
#else
  static constexpr int64_t kInputsPerWord = 2;
  template <int kRows>
  PYENGINE_INLINE void multiply_add(Vf (&acc)[kRows][kTileVectors], const float* x, int64_t ldx,
                                    const Vf* w) {
#pragma GCC unroll 2
    for (int k = 1; k >= 0; --k) {
      Vf wide[kTileVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) {
        wide[v] = k == 1 ? high_half(as_int(w[v])) : low_half(as_int(w[v]));
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vf xr = set1(x[r * ldx + k]);
#pragma GCC unroll 3
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = fma(xr, wide[v], acc[r][v]);
      }
    }
  }
#endif

  PYENGINE_INLINE Vf load_bf16_upto(const uint16_t* p, int64_t n) {
    return n >= kLanes ? load_bf16(p) : n > 0 ? load_bf16(p, static_cast<int>(n)) : zero();
  }

  // See DenseKernels::pack.
  static void pack_in_out(const DenseJob& j, int64_t word0, int64_t words, int64_t col0,
                          int64_t cols, float* dst, int64_t tile_words) {
    const int64_t ldw = j.out_features;
    for (int64_t i = 0; i < words; ++i) {
      const int64_t k = 2 * (word0 + i);
      const uint16_t* row = static_cast<const uint16_t*>(j.w) + k * ldw + col0;
      const bool has_odd = k + 1 < j.in_features;
      float* out = dst + i * kTile;
      for (int64_t c = 0; c < cols; c += kTile, out += tile_words * kTile, row += kTile) {
        const int64_t valid = ldw - (col0 + c);
        if (valid >= kTile && has_odd) {
          for (int64_t v = 0; v < kTile; v += kLanes) {
            store(out + v, merge_halves(load_bf16(row + v), load_bf16(row + v + ldw)));
          }
          __builtin_prefetch(row + kRowsAhead * ldw, 0, 2);
          __builtin_prefetch(row + (kRowsAhead + 1) * ldw, 0, 2);
        } else {
          for (int64_t v = 0; v < kTile; v += kLanes) {
            const Vf odd = has_odd ? load_bf16_upto(row + v + ldw, valid - v) : zero();
            store(out + v, merge_halves(load_bf16_upto(row + v, valid - v), odd));
          }
        }
      }
    }
  }

  // t[l] = words [k, k + kLanes) of column col + l's weights, zero outside the matrix.
  PYENGINE_INLINE void load_square(const DenseJob& j, int64_t col, int64_t cols, int64_t k, Vf* t) {
    const uint16_t* w = static_cast<const uint16_t*>(j.w) + col * j.in_features + 2 * k;
    const int64_t n = j.in_features - 2 * k;
    if (cols == kLanes && n >= 2 * kLanes) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        t[l] = as_float(load_halves(w + l * j.in_features));
        __builtin_prefetch(w + (l + kLanes) * j.in_features, 0, 2);
      }
    } else {
      for (int l = 0; l < kLanes; ++l) {
        const uint16_t* row = w + l * j.in_features;
        t[l] = l >= cols         ? zero()
               : n >= 2 * kLanes ? as_float(load_halves(row))
                                 : as_float(load_halves(row, static_cast<int>(n)));
      }
    }
  }
};

#if defined(PYENGINE_DOT_PAIRS)

// Rows of an even K already are words of pairs.
static int64_t prepared_words_bf16(int64_t in_features) {
  return in_features % 2 == 0 ? 0 : LayerBf16::words(in_features);
}

static void prepare_bf16(const void* x, int64_t rows, int64_t in_features, void* out) {
  const int64_t padded = 2 * LayerBf16::words(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* to = static_cast<uint16_t*>(out) + r * padded;
    __builtin_memcpy(to, static_cast<const uint16_t*>(x) + r * in_features,
                     static_cast<size_t>(in_features) * 2);
    to[padded - 1] = 0;
  }
}

#else

static int64_t prepared_words_bf16(int64_t in_features) {
  return 2 * LayerBf16::words(in_features);
}

static void prepare_bf16(const void* x, int64_t rows, int64_t in_features, void* out) {
  const int64_t padded = prepared_words_bf16(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + r * in_features;
    float* to = static_cast<float*>(out) + r * padded;
    int64_t k = 0;
    for (; k + kLanes <= in_features; k += kLanes) store(to + k, load_bf16(from + k));
    for (; k < padded; k += kLanes) {
      const int64_t left = in_features - k;
      store_upto(to + k, left > 0 ? load_bf16(from + k, static_cast<int>(left)) : zero(),
                 padded - k);
    }
  }
}

#endif

constexpr DenseKernels kDenseBf16 = {prepared_words_bf16,       prepare_bf16,
                                     scratch_floats<LayerBf16>, run_dense<LayerBf16>,
                                     pack<LayerBf16>,           kItemColumns};

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

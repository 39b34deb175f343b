// The bfloat16 `Layer` of dense.inl: fma(x[k], w[k], fma(x[k + 1], w[k + 1], s)) for each pair of
// k's.
//
// With PYENGINE_DOT_PAIRS (AVX-512 BF16) a word is the pair and one instruction does both steps.
// Without, x and panels are widened to float32 and each pair is swapped, so that a plain chain has
// that order. An odd K gets one more k of zeros.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

struct LayerBf16 {
  static int64_t weight_words(int64_t in_features) { return (in_features + 1) / 2; }

#if defined(PYENGINE_DOT_PAIRS)
  static constexpr int64_t kPanelRowsPerWord = 1;
  PYENGINE_INLINE Vf multiply_add(Vf acc, Vf x, Vf w) { return dot_pairs(acc, x, w); }
  PYENGINE_INLINE Vf multiply_add_word(Vf acc, const float* x, int64_t k, Vf w) {
    return dot_pairs(acc, set1(x[k]), w);
  }
  PYENGINE_INLINE void store_panel_rows(float* out, Vf word) { store(out, word); }
  // Panel rows of the pair of weight rows `even` and `odd`.
  PYENGINE_INLINE void store_pair(float* out, Vf even, Vf odd) {
    store(out, as_float(merge_halves(even, odd)));
  }
  // a, b += the pair's products, 2 kLanes columns in the order that restore() undoes.
  PYENGINE_INLINE void multiply_strip(Vf& a, Vf& b, const float* x, int64_t pair, Vi even, Vi odd) {
    Vf wa, wb;
    pair_rows(even, odd, wa, wb);
    const Vf xk = set1(x[pair]);
    a = dot_pairs(a, xk, wa);
    b = dot_pairs(b, xk, wb);
  }
  PYENGINE_INLINE void restore(Vf& a, Vf& b) { unpair_lanes(a, b); }
#else
  static constexpr int64_t kPanelRowsPerWord = 2;
  PYENGINE_INLINE Vf multiply_add(Vf acc, Vf x, Vf w) { return fma(x, w, acc); }
  PYENGINE_INLINE Vf multiply_add_word(Vf acc, const float* x, int64_t k, Vf w) {
    acc = fma(set1(x[2 * k]), high_half(as_int(w)), acc);
    return fma(set1(x[2 * k + 1]), low_half(as_int(w)), acc);
  }
  PYENGINE_INLINE void store_panel_rows(float* out, Vf word) {
    store(out, high_half(as_int(word)));
    store(out + kPanel, low_half(as_int(word)));
  }
  PYENGINE_INLINE void store_pair(float* out, Vf even, Vf odd) {
    store(out, odd);
    store(out + kPanel, even);
  }
  PYENGINE_INLINE void multiply_strip(Vf& a, Vf& b, const float* x, int64_t pair, Vi even, Vi odd) {
    const Vf x_odd = set1(x[2 * pair]), x_even = set1(x[2 * pair + 1]);
    a = fma(x_even, low_half(even), fma(x_odd, low_half(odd), a));
    b = fma(x_even, high_half(even), fma(x_odd, high_half(odd), b));
  }
  PYENGINE_INLINE void restore(Vf& a, Vf& b) { interleave(a, b); }
#endif

  static constexpr int64_t kBlockWords = ops::kReductionBlock / 2 * kPanelRowsPerWord;
  static int64_t words(int64_t in_features) {
    return weight_words(in_features) * kPanelRowsPerWord;
  }

  PYENGINE_INLINE Vf load_bf16_upto(const uint16_t* p, int64_t n) {
    return n >= kLanes ? load_bf16(p) : load_bf16(p, static_cast<int>(n));
  }

  static void pack_in_out(const DenseJob& j, int64_t k0, int64_t count, int64_t col0, int64_t cols,
                          float* dst) {
    const int64_t full = cols / kPanel, rest = cols % kPanel, ldw = j.out_features;
    const int64_t pair0 = k0 / kPanelRowsPerWord, pairs = count / kPanelRowsPerWord;
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t k = 2 * (pair0 + i);
      const uint16_t* row = static_cast<const uint16_t*>(j.w) + k * ldw + col0;
      const bool has_odd = k + 1 < j.in_features;
      float* out = dst + i * kPanelRowsPerWord * kPanel;
      for (int64_t p = 0; p < full; ++p, out += count * kPanel, row += kPanel) {
#pragma GCC unroll 3
        for (int v = 0; v < kTileVectors; ++v) {
          const uint16_t* at = row + v * kLanes;
          store_pair(out + v * kLanes, load_bf16(at), has_odd ? load_bf16(at + ldw) : zero());
          __builtin_prefetch(at + kRowsAhead * ldw, 0, 2);
          __builtin_prefetch(at + (kRowsAhead + 1) * ldw, 0, 2);
        }
      }
      if (rest > 0) {
        for (int v = 0; v < kTileVectors; ++v) {
          const uint16_t* at = row + v * kLanes;
          const int64_t n = rest - v * kLanes > 0 ? rest - v * kLanes : 0;
          store_pair(out + v * kLanes, load_bf16_upto(at, n),
                     has_odd ? load_bf16_upto(at + ldw, n) : zero());
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

  static void pack_out_in(const DenseJob& j, int64_t k0, int64_t count, int64_t col0, int64_t cols,
                          float* dst) {
    pack_squares<LayerBf16>(j, k0, count, col0, cols, dst);
  }

  // y[0, 2 kLanes kWords) of one row over K; with kWords == 1 the strip may have `cols` columns
  // only.
  template <int kWords>
  static void multiply_strip_rows(const float* x, const uint16_t* w, int64_t ldw,
                                  int64_t in_features, float* y, int cols = 2 * kLanes) {
    const int64_t pairs = weight_words(in_features);
    for (int64_t i0 = 0; i0 < pairs; i0 += ops::kReductionBlock / 2) {
      const int64_t end = smaller(i0 + ops::kReductionBlock / 2, pairs);
      const int64_t whole = smaller(end, in_features / 2);
      Vf a[kWords], b[kWords];
#pragma GCC unroll 12
      for (int v = 0; v < kWords; ++v) a[v] = b[v] = zero();
      for (int64_t i = i0; i < whole; ++i) {
        const uint16_t* row = w + 2 * i * ldw;
        if (kWords == 1 && cols < 2 * kLanes) {
          multiply_strip(a[0], b[0], x, i, load_halves(row, cols), load_halves(row + ldw, cols));
          continue;
        }
#pragma GCC unroll 12
        for (int v = 0; v < kWords; ++v) {
          const uint16_t* at = row + v * 2 * kLanes;
          multiply_strip(a[v], b[v], x, i, load_halves(at), load_halves(at + ldw));
          if (v * kLanes % 16 == 0) {
            __builtin_prefetch(at + kRowsAhead * ldw, 0, 2);
            __builtin_prefetch(at + (kRowsAhead + 1) * ldw, 0, 2);
          }
        }
      }
      for (int64_t i = whole > i0 ? whole : i0; i < end; ++i) {  // the last k of an odd K
        const uint16_t* row = w + 2 * i * ldw;
        for (int v = 0; v < kWords; ++v) {
          const Vi even = kWords == 1 && cols < 2 * kLanes ? load_halves(row, cols)
                                                           : load_halves(row + v * 2 * kLanes);
          multiply_strip(a[v], b[v], x, i, even, set1(0));
        }
      }
#pragma GCC unroll 12
      for (int v = 0; v < kWords; ++v) {
        restore(a[v], b[v]);
        float* p = y + v * 2 * kLanes;
        store(p, i0 == 0 ? a[v] : add(load(p), a[v]));
        store(p + kLanes, i0 == 0 ? b[v] : add(load(p + kLanes), b[v]));
      }
    }
  }

  static void run_strips(const DenseJob& j, const float* x, int64_t col0, int64_t cols, float* y) {
    constexpr int kWords = kStripVectors / 2, kColumns = 2 * kLanes;
    const int64_t ldw = j.out_features;
    const uint16_t* w = static_cast<const uint16_t*>(j.w) + col0;
    int64_t i = 0;
    for (; cols - i >= kWords * kColumns; i += kWords * kColumns) {
      multiply_strip_rows<kWords>(x, w + i, ldw, j.in_features, y + i);
    }
    for (; cols - i >= kWords / 2 * kColumns; i += kWords / 2 * kColumns) {
      multiply_strip_rows<kWords / 2>(x, w + i, ldw, j.in_features, y + i);
    }
    for (; i < cols; i += kColumns) {
      const int last = static_cast<int>(smaller(cols - i, kColumns));
      multiply_strip_rows<1>(x, w + i, ldw, j.in_features, y + i, last);
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

static int64_t prepared_words_bf16(int64_t in_features) { return LayerBf16::words(in_features); }

static void prepare_bf16(const void* x, int64_t rows, int64_t in_features, void* out) {
  const int64_t words = LayerBf16::words(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + r * in_features;
    uint32_t* to = static_cast<uint32_t*>(out) + r * words;
    for (int64_t k = 0; k + 1 < in_features; k += 2) {
      to[k] = static_cast<uint32_t>(from[k + 1]) << 16;
      to[k + 1] = static_cast<uint32_t>(from[k]) << 16;
    }
    if (in_features % 2 != 0) {
      to[words - 2] = 0;
      to[words - 1] = static_cast<uint32_t>(from[in_features - 1]) << 16;
    }
  }
}

#endif

constexpr DenseKernels kDenseBf16 = {prepared_words_bf16, prepare_bf16, scratch_floats<LayerBf16>,
                                     run_dense<LayerBf16>, kPanel};

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

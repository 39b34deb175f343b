// Quantised dense layers: y = x w with 8-bit inputs and 8-bit weights, packed (ops/types.h).
//
// A row of x is quantised when it is read: per group of kInputGroup k's q = round(x / s) with
// s = max |x| / 127. With integer weights u - 128 and a scale per column,
//   y[n] = scale[n] (s_0 i_0 + s_1 i_1 + …),   i_g = sum over group g of q[k] u[k][n] - 128 sum
//   q[k],
// i_g exact, the sum over g one chain of FMAs from zero. The integers do not depend on the order of
// their sums, so rows, columns and k may be cut in any way and on any instruction set.
//
// packed_nibbles weights are unpacked to such bytes on the way: in registers for a few rows, into
// scratch for many.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kInputGroup = ops::kInputGroup;
constexpr int64_t kNibbleGroup = ops::kNibbleGroup;
constexpr int kTileVecs = ops::kTileColumns / kLanes;  // vectors of a tile of 16 columns
constexpr int kDotRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLinesAhead = 64;  // 4 KB: one stream of memory, a third of a microsecond ahead

// Where the parts of a prepared row begin: padded inputs, then for each group the scale (f32), then
// for each group -128 times the sum of its inputs (i32).
struct RowLayout {
  int64_t inputs;  // K padded
  int64_t groups;
  int64_t words;  // of a row, whole cache lines

  explicit constexpr RowLayout(int64_t in_features)
      : inputs((in_features + ops::kQuantPad - 1) / ops::kQuantPad * ops::kQuantPad),
        groups((in_features + kInputGroup - 1) / kInputGroup),
        words(ops::quantized_row_words(in_features)) {}

  const float* scales(const int32_t* row) const {
    return reinterpret_cast<const float*>(row + inputs / 4);
  }
  const int32_t* offsets(const int32_t* row) const { return row + inputs / 4 + groups; }
};

static int64_t prepared_words_quant(int64_t in_features) { return RowLayout(in_features).words; }

// x: `count` floats, at most kInputGroup. The products and sums are rounded one by one, so that
// every instruction set makes the same integers. Infinity and NaN become a scale of NaN.
static void quantize_group(const float* x, int64_t count, int64_t padded, int8_t* q, float* scale,
                           int32_t* offset) {
  Vf highest = zero(), bad = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vf v = load_upto(x + i, count - i);
    highest = max(abs(v), highest);
    bad = add(bad, mul(v, zero()));
  }
  const float most = max_of(highest), fault = sum(bad);
  constexpr float kSmallest = 1e-30f;  // below, 127 / most would be infinite
  const bool is_zero = !(most >= kSmallest);
  *scale = fault + (is_zero ? 0.0f : most / 127.0f);
  const bool finite = fault == 0.0f;
  const Vf inverse = set1(is_zero || !finite ? 0.0f : 127.0f / most);
  const Vf shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vi shift_bits = as_int(shift);
  Vi total = set1(0);
  int64_t i = 0;
  for (; i < count; i += kLanes) {
    const Vf v = finite ? load_upto(x + i, count - i) : zero();
    const Vi n = sub_words(as_int(add(mul(v, inverse), shift)), shift_bits);
    total = add(total, n);
    store_low_bytes(q + i, n);  // beyond `count` zeros, within the padding
  }
  for (; i < padded; i += kLanes) store_low_bytes(q + i, set1(0));
  *offset = -128 * sum_of(total);
}

static void prepare_quant(const void* x, int64_t rows, int64_t in_features, void* out) {
  const RowLayout layout(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = static_cast<const float*>(x) + r * in_features;
    int32_t* row = static_cast<int32_t*>(out) + r * layout.words;
    float* scales = reinterpret_cast<float*>(row + layout.inputs / 4);
    int32_t* offsets = row + layout.inputs / 4 + layout.groups;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t k = g * kInputGroup;
      quantize_group(from + k, smaller(kInputGroup, in_features - k),
                     smaller(kInputGroup, layout.inputs - k), reinterpret_cast<int8_t*>(row) + k,
                     scales + g, offsets + g);
    }
  }
}

// One tile of 16 columns and some rows.
struct QuantTile {
  const int32_t* rows;  // prepared
  const int32_t* x;     // their inputs as the products read them, ldx words apart
  int64_t ldx;
  const uint8_t* w;      // the tile's lines
  const uint8_t* group;  // packed_nibbles: 16 bytes for each kNibbleGroup k's
  float* y;              // y[r][0, 16), ldy apart
  int64_t ldy;
  bool prefetch;
};

// What one step of the loop over k reads: kWords words of each of the rows.
struct Int8Words {
  static constexpr int kLinesPerStep = 4;
  static constexpr int kWordsPerLine = 1;
  PYENGINE_INLINE void load(const uint8_t* w, int line, int v, const Group&, Vi* words) {
    words[0] = load_words(w + line * kLineBytes + v * kLanes * 4);
  }
};
struct Int4Words {
  static constexpr int kLinesPerStep = kNibbleGroup / 8;
  static constexpr int kWordsPerLine = 2;
  PYENGINE_INLINE void load(const uint8_t* w, int line, int v, const Group& g, Vi* words) {
    unpack(load_words(w + line * kLineBytes + v * kLanes * 4), g, words[0], words[1]);
  }
};

// Chains of sums for each element, so that the latency of a dot product does not show.
constexpr int dot_chains(int rows) {
  constexpr int kSums = kLanes == 16 ? 16 : 8;
  const int chains = kSums / (rows * kTileVecs);
  return chains >= 4 ? 4 : chains >= 2 ? 2 : 1;
}

template <class Words, int kRows>
static void dot_tile(const QuantTile& t, const RowLayout& layout) {
  const int64_t ldx = t.ldx, half = layout.inputs / 4;
  constexpr int kChains = dot_chains(kRows);
  constexpr int kStep = Words::kLinesPerStep;
  constexpr int kPerLine = Words::kWordsPerLine;
  const uint8_t* w = t.w;
  const uint8_t* group_bytes = t.group;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t words = smaller(kInputGroup, layout.inputs - g * kInputGroup) / 4;
    const int32_t* x = t.x + g * (kInputGroup / 4);
    Vi acc[kChains][kRows][kTileVecs];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) acc[c][r][v] = set1(0);
      }
    }
    for (int64_t k = 0; k < words; k += kStep * kPerLine) {
      Group groups[kTileVecs] = {};
      if constexpr (kPerLine == 2) {
        for (int v = 0; v < kTileVecs; ++v) groups[v] = load_group(group_bytes + v * kLanes);
        group_bytes += ops::kTileColumns;
      }
#pragma GCC unroll 4
      for (int line = 0; line < kStep; ++line) {
        if (t.prefetch) __builtin_prefetch(w + (line + kLinesAhead) * kLineBytes, 0, 3);
        Vi loaded[kTileVecs][kPerLine];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) Words::load(w, line, v, groups[v], loaded[v]);
#pragma GCC unroll 2
        for (int i = 0; i < kPerLine; ++i) {
          const int word = line * kPerLine + i, chain = word % kChains;
          Bytes b[kTileVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kTileVecs; ++v) b[v] = bytes(loaded[v][i]);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const Inputs in = inputs(x + r * ldx + word, half);
#pragma GCC unroll 4
            for (int v = 0; v < kTileVecs; ++v) dot(acc[chain][r][v], b[v], in);
          }
        }
      }
      x += kStep * kPerLine;
      w += kStep * kLineBytes;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int32_t* row = t.rows + r * layout.words;
      const Vf scale = set1(layout.scales(row)[g]);
      const Vi offset = set1(layout.offsets(row)[g]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        Vi sum = acc[0][r][v];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sum = add(sum, acc[c][r][v]);
        float* y = t.y + r * t.ldy + v * kLanes;
        store(y, fma(scale, to_float(add(sum, offset)), g == 0 ? zero() : load(y)));
      }
    }
  }
}

// A `Layer` is a form of weights: what it makes of a row of inputs before the products, once for
// all tiles of an item, and the products of a tile.
struct LayerInt8 {
  static constexpr bool kNibbles = false, kUnpacks = false;
  static int64_t spread_words(const RowLayout& layout) {
    return kSpreadsInputs ? layout.inputs / 2 : 0;
  }
  static void spread(const int32_t* row, const RowLayout& layout, int32_t* out) {
    spread_inputs(row, layout.inputs / 4, out);
  }
  template <int kRows>
  PYENGINE_INLINE void multiply(const QuantTile& t, const RowLayout& layout) {
    dot_tile<Int8Words, kRows>(t, layout);
  }
};

struct LayerInt4 : LayerInt8 {
  static constexpr bool kNibbles = true, kUnpacks = true;  // for more than kDotRows rows
  template <int kRows>
  PYENGINE_INLINE void multiply(const QuantTile& t, const RowLayout& layout) {
    dot_tile<Int4Words, kRows>(t, layout);
  }
};

template <class Layer, int kRows = kDotRows>
PYENGINE_INLINE void dot_rows(int64_t rows, const QuantTile& t, const RowLayout& layout) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      Layer::template multiply<kRows>(t, layout);
    } else {
      dot_rows<Layer, kRows - 1>(rows, t, layout);
    }
  }
}

// A tile of nibbles to 16 K bytes.
static void unpack_tile(const uint8_t* w, const uint8_t* group, int64_t inputs, uint8_t* out) {
  for (int64_t k = 0; k < inputs; k += kNibbleGroup, group += ops::kTileColumns) {
    for (int v = 0; v < kTileVecs; ++v) {
      const Group g = load_group(group + v * kLanes);
      for (int line = 0; line < kNibbleGroup / 8; ++line) {
        Vi low, high;
        unpack(load_words(w + line * kLineBytes + v * kLanes * 4), g, low, high);
        store_words(out + 2 * line * kLineBytes + v * kLanes * 4, low);
        store_words(out + (2 * line + 1) * kLineBytes + v * kLanes * 4, high);
      }
    }
    w += kNibbleGroup / 8 * kLineBytes;
    out += kNibbleGroup / 4 * kLineBytes;
  }
}

// One row of activated outputs, quantized as the next layer wants it. The item's columns begin and
// end with groups, or with the row.
static void store_quantized(const DenseJob& j, int64_t row, int64_t col, int64_t n, float* y) {
  const RowLayout layout(j.out_features);
  int32_t* out = static_cast<int32_t*>(j.out) + row * layout.words;
  activate_row(j, col, n, y);
  for (int64_t i = 0; i < n; i += kInputGroup) {
    const int64_t k = col + i, g = k / kInputGroup;
    quantize_group(y + i, smaller(kInputGroup, n - i), smaller(kInputGroup, layout.inputs - k),
                   reinterpret_cast<int8_t*>(out) + k,
                   reinterpret_cast<float*>(out + layout.inputs / 4) + g,
                   out + layout.inputs / 4 + layout.groups + g);
  }
}

PYENGINE_INLINE void finish_quant_row(const DenseJob& j, int64_t row, int64_t col, int64_t n,
                                      float* y) {
  if (j.store == Store::quantized) {
    store_quantized(j, row, col, n, y);
  } else {
    finish_row(j, row, col, n, y);
  }
}

// The last step: columns [col0, col0 + cols) of the rows from sums in c to their place.
static void finish_rows(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t cols,
                        float* c, int64_t ldc) {
  for (int64_t row = row0; row < row1; ++row, c += ldc) {
    for (int64_t i = 0; i < cols; i += kLanes) {
      store(c + i, mul(load(c + i), load_upto(j.w_scale + col0 + i, cols - i)));
    }
    finish_quant_row(j, row, col0, cols, c);
  }
}

// Rows whose inputs are spread at a time: they stay in the second-level cache.
constexpr int64_t kSpreadWords = 64 * 1024;

template <class Layer>
static int64_t rows_at_once(const RowLayout& layout, int64_t rows) {
  const int64_t words = Layer::spread_words(layout);
  if (words == 0) return rows;
  const int64_t most = kSpreadWords / words / kDotRows * kDotRows;
  return smaller(most > kDotRows ? most : kDotRows, rows);
}

template <class Layer>
static int64_t scratch_floats_quant(int64_t in_features, int64_t rows, int64_t cols) {
  const RowLayout layout(in_features);
  const int64_t sums = rows * ((cols + 15) / 16 * 16);
  const int64_t spread = rows_at_once<Layer>(layout, rows) * Layer::spread_words(layout);
  const bool unpacks = Layer::kUnpacks && rows > kDotRows;
  return sums + spread + (unpacks ? layout.inputs * 4 : 0);
}

template <class Layer>
static void run_quant(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                      float* scratch) {
  const RowLayout layout(j.in_features);
  constexpr bool kNibbles = Layer::kNibbles;
  const int64_t rows = row1 - row0, cols = col1 - col0, ldc = (cols + 15) / 16 * 16;
  const int64_t tile_bytes = layout.inputs * (kNibbles ? 8 : 16);
  // More rows than one pass takes: a tile of nibbles is unpacked once for all of them.
  const bool unpacks = Layer::kUnpacks && rows > kDotRows;
  const int64_t most_rows = rows_at_once<Layer>(layout, rows), words = Layer::spread_words(layout);
  auto* spread = reinterpret_cast<int32_t*>(scratch + rows * ldc);
  auto* unpacked = reinterpret_cast<uint8_t*>(spread + most_rows * words);
  for (int64_t r0 = 0; r0 < rows; r0 += most_rows) {
    const int64_t r1 = smaller(r0 + most_rows, rows);
    const int32_t* prepared = static_cast<const int32_t*>(j.x) + (row0 + r0) * layout.words;
    for (int64_t r = 0; words > 0 && r < r1 - r0; ++r) {
      Layer::spread(prepared + r * layout.words, layout, spread + r * words);
    }
    QuantTile t;
    t.ldx = words > 0 ? words : layout.words;
    t.ldy = ldc;
    for (int64_t col = 0; col < cols; col += ops::kTileColumns) {
      const int64_t tile = (col0 + col) / ops::kTileColumns;
      t.w = static_cast<const uint8_t*>(j.w) + tile * tile_bytes;
      t.group = kNibbles ? j.w_group + tile * (layout.inputs / kNibbleGroup * 16) : nullptr;
      if (unpacks) {
        unpack_tile(t.w, t.group, layout.inputs, unpacked);
        t.w = unpacked;
      }
      for (int64_t r = r0; r < r1; r += kDotRows) {
        t.rows = prepared + (r - r0) * layout.words;
        t.x = words > 0 ? spread + (r - r0) * words : t.rows;
        t.y = scratch + r * ldc + col;
        t.prefetch = r == 0 && !unpacks;
        const int64_t count = smaller(kDotRows, r1 - r);
        unpacks ? dot_rows<LayerInt8>(count, t, layout) : dot_rows<Layer>(count, t, layout);
      }
    }
  }
  finish_rows(j, row0, row1, col0, cols, scratch, ldc);
}

template <class Layer>
constexpr DenseKernels quant_kernels() {
  return {prepared_words_quant, prepare_quant, scratch_floats_quant<Layer>,
          run_quant<Layer>,     nullptr,       32};
}

[[maybe_unused]] constexpr DenseKernels kDenseInt8 = quant_kernels<LayerInt8>();
#if !defined(PYENGINE_NIBBLE_PAIRS)  // dense_nibbles.inl has its own
[[maybe_unused]] constexpr DenseKernels kDenseInt4 = quant_kernels<LayerInt4>();
#endif

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

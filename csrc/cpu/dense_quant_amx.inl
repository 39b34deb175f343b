// Quantised dense layers in AMX tiles, for more rows than a few: the same integers as
// dense_quant.inl, 64 k's of 16 rows and 16 columns at a time, the same chain of floats.
//
// A packed tile of 64 k's is a B tile as it lies; nibbles are unpacked, two columns of tiles at a
// time, into scratch. Two by two tiles of sums are in work at once, so that each loaded tile serves
// twice.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kAmxLeastRows = 5;  // below, vpdpbusd keeps up with memory
constexpr int64_t kAmxTileRows = 16;
constexpr int64_t kAmxBlockRows = 32;  // two tiles
constexpr int64_t kAmxBlockCols = 32;
constexpr int64_t kAmxTileBytes = 1024;
constexpr int64_t kSumWords = 4 * 256;  // of the four tiles

// Tiles 0 to 3 hold sums (row tile, column tile) 00, 01, 10, 11; 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) QuantTileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit QuantTileConfig(int64_t block_rows) {
    const int64_t low = block_rows < kAmxTileRows ? block_rows : kAmxTileRows;
    const int64_t high = block_rows - low > 0 ? block_rows - low : low;  // unused without a second
    for (int t = 0; t < 8; ++t) {
      const bool second = t == 2 || t == 3 || t == 5;
      row_bytes[t] = 64;
      rows[t] = static_cast<uint8_t>(t >= 6 ? 16 : second ? high : low);
    }
  }
};

// The sums of one group of a block, stored, to be added to y while the next group is multiplied.
struct PendingGroup {
  const int32_t* sums = nullptr;  // [row tile][column tile][16][16]; null: nothing to add
  const int32_t* side = nullptr;  // the first row's scale; its offset is `groups` words further on
  float* y = nullptr;
  int64_t rows = 0;
  bool first = false, last = false;  // group: y is set, and multiplied by the columns' scales
  Vf scale[2];
};

// Where the parts of all blocks lie.
struct AmxStrides {
  int64_t inputs, groups;
  int64_t ldx;  // words
  int64_t ldy;
};

template <bool kTwoCols, bool kFirst, bool kLast>
PYENGINE_INLINE void add_sums(const PendingGroup& p, const AmxStrides& st, int64_t row0,
                              int64_t rows) {
  // Rows of the second tile lie two tiles further on.
  const int32_t* sums = p.sums + row0 * 16 + (row0 >= kAmxTileRows ? 256 : 0);
  const int32_t* side = p.side + row0 * st.ldx;
  float* y = p.y + row0 * st.ldy;
  for (int64_t r = 0; r < rows; ++r, sums += 16, side += st.ldx, y += st.ldy) {
    const Vf scale = as_float(set1(side[0]));
    const Vi offset = set1(side[st.groups]);
#pragma GCC unroll 2
    for (int v = 0; v < (kTwoCols ? 2 : 1); ++v) {
      const Vf sum = to_float(add(load_words(sums + v * 256), offset));
      const Vf total = fma(scale, sum, kFirst ? zero() : load(y + v * 16));
      store(y + v * 16, kLast ? mul(total, p.scale[v]) : total);
    }
  }
}

constexpr int64_t kRowsPerStep =
    8;  // of the pending group in each of the four steps of a whole one

// y (+)= scale (sums + offset) for the rows of a step.
template <bool kTwoCols>
PYENGINE_INLINE void add_pending(const PendingGroup& p, const AmxStrides& st, int64_t step) {
  const int64_t row0 = step * kRowsPerStep, rows = smaller(kRowsPerStep, p.rows - row0);
  if (p.sums == nullptr || rows <= 0) return;
  if (p.first) {
    p.last ? add_sums<kTwoCols, true, true>(p, st, row0, rows)
           : add_sums<kTwoCols, true, false>(p, st, row0, rows);
  } else {
    p.last ? add_sums<kTwoCols, false, true>(p, st, row0, rows)
           : add_sums<kTwoCols, false, false>(p, st, row0, rows);
  }
}

template <bool kTwoCols>
PYENGINE_INLINE void finish_pending(PendingGroup& p, const AmxStrides& st, int64_t step) {
  for (; step * kRowsPerStep < p.rows; ++step) add_pending<kTwoCols>(p, st, step);
  p.sums = nullptr;
}

struct AmxBlock {
  const int32_t* x;  // the first row
  int64_t rows;
  const uint8_t* w[2];     // B tiles of the two columns of tiles
  const uint8_t* next[2];  // what to fetch meanwhile, or null
  int32_t* sums;           // 2 * kSumWords: the groups take turns
  float* y;
  Vf scale[2];
};

PYENGINE_INLINE void fetch_tile(const uint8_t* p) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) __builtin_prefetch(p + line * kLineBytes, 0, 2);
}

template <bool kTwoRows, bool kTwoCols>
static void multiply_block(const AmxBlock& block, const AmxStrides& strides) {
  const AmxBlock b = block;
  const AmxStrides st = strides;
  const int64_t stride = st.ldx * 4;
  const char* x = reinterpret_cast<const char*>(b.x);
  const char* x_high = x + kAmxTileRows * stride;
  PendingGroup pending;
  pending.side = b.x + st.inputs / 4;
  pending.y = b.y;
  pending.rows = b.rows;
  pending.scale[0] = b.scale[0];
  pending.scale[1] = b.scale[1];
  int64_t at = 0;  // bytes into the columns of tiles
  for (int64_t g = 0; g < st.groups; ++g) {
    _tile_zero(0);
    if (kTwoCols) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoCols) _tile_zero(3);
    const int64_t end = smaller((g + 1) * kInputGroup, st.inputs);
    int64_t step = 0;
    for (int64_t k = g * kInputGroup; k < end; k += ops::kQuantPad, at += kAmxTileBytes, ++step) {
      _tile_loadd(4, x + k, stride);
      _tile_loadd(6, b.w[0] + at, 64);
      _tile_dpbsud(0, 4, 6);
      if (b.next[0] != nullptr) fetch_tile(b.next[0] + at);
      if (kTwoCols) {
        _tile_loadd(7, b.w[1] + at, 64);
        _tile_dpbsud(1, 4, 7);
        if (b.next[1] != nullptr) fetch_tile(b.next[1] + at);
      }
      if (kTwoRows) {
        _tile_loadd(5, x_high + k, stride);
        _tile_dpbsud(2, 5, 6);
        if (kTwoCols) _tile_dpbsud(3, 5, 7);
      }
      add_pending<kTwoCols>(pending, st, step);
    }
    if (pending.sums != nullptr) finish_pending<kTwoCols>(pending, st, step);
    int32_t* sums = b.sums + g % 2 * kSumWords;
    _tile_stored(0, sums, 64);
    if (kTwoCols) _tile_stored(1, sums + 256, 64);
    if (kTwoRows) _tile_stored(2, sums + 512, 64);
    if (kTwoRows && kTwoCols) _tile_stored(3, sums + 768, 64);
    pending.sums = sums;
    if (g > 0) ++pending.side;
    pending.first = g == 0;
    pending.last = g + 1 == st.groups;
  }
  finish_pending<kTwoCols>(pending, st, 0);
}

template <class Layer>
static int64_t scratch_floats_amx(int64_t in_features, int64_t rows, int64_t cols) {
  const int64_t padded = (cols + 15) / 16 * 16;
  const int64_t own = kAmxBlockRows * padded + 2 * kSumWords +
                      (Layer::kNibbles ? RowLayout(in_features).inputs * padded / 4 : 0);
  const int64_t few = scratch_floats_quant<Layer>(in_features, rows, cols);
  return rows < kAmxLeastRows ? few : own;
}

template <class Layer>
static void run_amx(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                    float* scratch) {
  const int64_t rows = row1 - row0, cols = col1 - col0, ldc = (cols + 15) / 16 * 16;
  if (rows < kAmxLeastRows) {
    run_quant<Layer>(j, row0, row1, col0, col1, scratch);
    return;
  }
  const RowLayout layout(j.in_features);
  const AmxStrides strides = {layout.inputs, layout.groups, layout.words, ldc};
  constexpr bool kNibbles = Layer::kNibbles;
  const int64_t first_tile = col0 / ops::kTileColumns, tile_bytes = layout.inputs * 16;
  AmxBlock b;
  b.sums = reinterpret_cast<int32_t*>(scratch + kAmxBlockRows * ldc);
  const uint8_t* w = static_cast<const uint8_t*>(j.w) + first_tile * tile_bytes;
  if constexpr (kNibbles) {
    auto* unpacked = reinterpret_cast<uint8_t*>(b.sums + 2 * kSumWords);
    for (int64_t t = 0; t < ldc / 16; ++t) {
      const int64_t tile = first_tile + t;
      unpack_tile(static_cast<const uint8_t*>(j.w) + tile * tile_bytes / 2,
                  j.w_group + tile * (layout.inputs / kNibbleGroup * 16), layout.inputs,
                  unpacked + t * tile_bytes);
    }
    w = unpacked;
  }
  const QuantTileConfig whole(kAmxBlockRows), last((rows - 1) % kAmxBlockRows + 1);
  const QuantTileConfig* current = nullptr;
  // Rows outside, columns inside: sums stay in the first-level cache until they are finished.
  for (int64_t r = 0; r < rows; r += kAmxBlockRows) {
    b.x = static_cast<const int32_t*>(j.x) + (row0 + r) * layout.words;
    b.rows = smaller(kAmxBlockRows, rows - r);
    const QuantTileConfig* config = b.rows == kAmxBlockRows ? &whole : &last;
    if (config != current) _tile_loadconfig(config);
    current = config;
    for (int64_t col = 0; col < cols; col += kAmxBlockCols) {
      const bool two_cols = cols - col > ops::kTileColumns;
      for (int c = 0; c < 2; ++c) {
        const int64_t at = col + c * 16;
        b.w[c] = w + at / 16 * tile_bytes;
        const bool fetch = !kNibbles && r == 0 && cols - at > kAmxBlockCols;
        b.next[c] = fetch ? b.w[c] + 2 * tile_bytes : nullptr;
        b.scale[c] = at < cols ? load_upto(j.w_scale + col0 + at, cols - at) : zero();
      }
      b.y = scratch + col;
      if (b.rows > kAmxTileRows) {
        two_cols ? multiply_block<true, true>(b, strides) : multiply_block<true, false>(b, strides);
      } else {
        two_cols ? multiply_block<false, true>(b, strides)
                 : multiply_block<false, false>(b, strides);
      }
    }
    for (int64_t i = 0; i < b.rows; ++i) {
      finish_quant_row(j, row0 + r + i, col0, cols, scratch + i * ldc);
    }
  }
  _tile_release();
}

constexpr DenseKernels kDenseInt8Amx = {
    prepared_words_quant, prepare_quant, scratch_floats_amx<LayerInt8>,
    run_amx<LayerInt8>,   nullptr,       32};
constexpr DenseKernels kDenseInt4Amx = {
    prepared_words_quant, prepare_quant, scratch_floats_amx<LayerInt4>,
    run_amx<LayerInt4>,   nullptr,       32};

}  // namespace

const DenseKernels& dense_int8() { return kDenseInt8Amx; }
const DenseKernels& dense_int4() { return kDenseInt4Amx; }

}  // namespace pyengine::cpu::PYENGINE_ISA

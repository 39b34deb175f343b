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

struct AmxBlock {
  const int32_t* x;  // the first row
  int64_t rows;
  const uint8_t* w[2];     // B tiles of the two columns of tiles
  const uint8_t* next[2];  // what to fetch meanwhile, or null
  int32_t* sums;           // 4 tiles
  float* y;
  int64_t ldy;
};

// y (+)= scale (sums + offset) of a group, for one row tile.
template <bool kTwoCols>
PYENGINE_INLINE void add_group(const AmxBlock& b, int64_t row0, int64_t rows, const int32_t* sums,
                               int64_t g, const RowLayout& layout) {
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* row = b.x + (row0 + r) * layout.words;
    const Vf scale = set1(layout.scales(row)[g]);
    const Vi offset = set1(layout.offsets(row)[g]);
    float* y = b.y + (row0 + r) * b.ldy;
#pragma GCC unroll 2
    for (int v = 0; v < (kTwoCols ? 2 : 1); ++v) {
      const Vi sum = add(load_words(sums + v * 256 + r * 16), offset);
      store(y + v * 16, fma(scale, to_float(sum), g == 0 ? zero() : load(y + v * 16)));
    }
  }
}

PYENGINE_INLINE void fetch_tile(const uint8_t* p) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) __builtin_prefetch(p + line * kLineBytes, 0, 2);
}

template <bool kTwoRows, bool kTwoCols>
static void multiply_block(const AmxBlock& b, const RowLayout& layout) {
  const int64_t stride = layout.words * 4;
  const char* x = reinterpret_cast<const char*>(b.x);
  const char* x_high = x + kAmxTileRows * stride;
  const int64_t low_rows = smaller(b.rows, kAmxTileRows);
  int64_t at = 0;  // bytes into the columns of tiles
  for (int64_t g = 0; g < layout.groups; ++g) {
    _tile_zero(0);
    if (kTwoCols) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoCols) _tile_zero(3);
    const int64_t end = smaller((g + 1) * kInputGroup, layout.inputs);
    for (int64_t k = g * kInputGroup; k < end; k += ops::kQuantPad, at += kAmxTileBytes) {
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
    }
    _tile_stored(0, b.sums, 64);
    if (kTwoCols) _tile_stored(1, b.sums + 256, 64);
    if (kTwoRows) _tile_stored(2, b.sums + 512, 64);
    if (kTwoRows && kTwoCols) _tile_stored(3, b.sums + 768, 64);
    add_group<kTwoCols>(b, 0, low_rows, b.sums, g, layout);
    if (kTwoRows) {
      add_group<kTwoCols>(b, kAmxTileRows, b.rows - kAmxTileRows, b.sums + 512, g, layout);
    }
  }
}

template <class Layer>
static int64_t scratch_floats_amx(int64_t in_features, int64_t rows, int64_t cols) {
  const int64_t own = rows * ((cols + 15) / 16 * 16) + 4 * 256 +
                      (Layer::kWordsPerLine == 2 ? RowLayout(in_features).inputs * 8 : 0);
  const int64_t few = scratch_floats_quant<Layer>(in_features, rows, cols);
  return own > few ? own : few;
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
  constexpr bool kNibbles = Layer::kWordsPerLine == 2;
  const int64_t tile_bytes = layout.inputs * (kNibbles ? 8 : 16);
  const int64_t tile_groups = layout.inputs / kNibbleGroup * 16;
  AmxBlock b;
  b.ldy = ldc;
  b.sums = reinterpret_cast<int32_t*>(scratch + rows * ldc);
  auto* unpacked = reinterpret_cast<uint8_t*>(b.sums + 4 * 256);
  const int64_t last_rows = (rows - 1) % kAmxBlockRows + 1;
  const QuantTileConfig whole(kAmxBlockRows), last(last_rows);
  const QuantTileConfig* current = nullptr;
  for (int64_t col = 0; col < cols; col += kAmxBlockCols) {
    const bool two_cols = cols - col > ops::kTileColumns;
    const int64_t tile = (col0 + col) / ops::kTileColumns;
    const uint8_t* w = static_cast<const uint8_t*>(j.w) + tile * tile_bytes;
    for (int c = 0; c < (two_cols ? 2 : 1); ++c) {
      if constexpr (kNibbles) {
        b.w[c] = unpacked + c * layout.inputs * 16;
        unpack_tile(w + c * tile_bytes, j.w_group + (tile + c) * tile_groups, layout.inputs,
                    unpacked + c * layout.inputs * 16);
      } else {
        b.w[c] = w + c * tile_bytes;
      }
    }
    for (int64_t r = 0; r < rows; r += kAmxBlockRows) {
      b.x = static_cast<const int32_t*>(j.x) + (row0 + r) * layout.words;
      b.rows = smaller(kAmxBlockRows, rows - r);
      b.y = scratch + r * ldc + col;
      for (int c = 0; c < 2; ++c) {
        const bool fetch = !kNibbles && r == 0 && cols - col > kAmxBlockCols + c * 16;
        b.next[c] = fetch ? b.w[0] + (2 + c) * tile_bytes : nullptr;
      }
      const QuantTileConfig* config = b.rows == kAmxBlockRows ? &whole : &last;
      if (config != current) _tile_loadconfig(config);
      current = config;
      if (b.rows > kAmxTileRows) {
        two_cols ? multiply_block<true, true>(b, layout) : multiply_block<true, false>(b, layout);
      } else {
        two_cols ? multiply_block<false, true>(b, layout) : multiply_block<false, false>(b, layout);
      }
    }
  }
  _tile_release();
  finish_rows(j, row0, row1, col0, cols, scratch, ldc);
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

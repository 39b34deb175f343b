// bfloat16 dense layers on AMX: 16 rows x 32 k's of x times 32 k's x 16 columns, which is how
// packed weights lie, added to 16 x 16 sums by one instruction.
//
// The order of an element's sum is the processor's (ops.h), whatever the tiles around it hold, so
// rows may be computed in any company. Sums may rest in memory between two blocks of k: they are
// float32 there, too.

#include <immintrin.h>

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kTileRowsAmx = 16;
constexpr int64_t kTileWords = 16;                   // of k: 32 bf16
constexpr int64_t kTileFloats = kTileWords * kTile;  // a tile of weights, 1 KB
constexpr int64_t kTileStride = kTile * 4;           // bytes from line to line of weights
constexpr int64_t kBlockWordsAmx = 192;              // 2 column tiles of a block fill half an L1
constexpr int64_t kTilesNear = 1, kTilesFar = 4;

constexpr int64_t kRowTilesAtOnce = 4;  // of a step, at most: its weights are read once

// Tiles 0..3 hold sums, 4 and 5 x, 6 and 7 weights, or 6 weights and the others x. `rows` of x and
// of sums, all of weights: where x is in tile 7 there are 16 of either.
static void configure_tiles(int64_t rows) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileWords);
  }
  _tile_loadconfig(&config);
}

// The compiler does not know that the tile instructions read memory.
PYENGINE_INLINE void written() { asm volatile("" ::: "memory"); }

struct TileBlock {
  const float* x[kRowTilesAtOnce];  // of each row tile
  int64_t x_stride;                 // bytes
  const float* w;                   // of the first column tile; tiles w_tile floats apart
  int64_t w_tile;
  int64_t steps;     // of kTileWords words
  float* c;          // sums of the first row and column tile
  int64_t c_tile;    // floats from row tile to row tile
  int64_t c_stride;  // bytes
  bool first;
  bool from_memory;  // ask for weights ahead of time
};

// Asks for a quarter of the lines of the tiles kTilesNear after w, from the second-level cache to
// the first, and kTilesFar after it, from memory to the second: kColTiles of each, w_tile floats
// apart. All of a tile's lines at once would take the buffers through which x arrives.
template <int kQuarter, int kColTiles>
PYENGINE_INLINE void prefetch_quarter(const TileBlock& b, const float* w) {
  if (!b.from_memory) return;
#pragma GCC unroll 4
  for (int t = 0; t < kColTiles; ++t) {
#pragma GCC unroll 4
    for (int i = kQuarter * 4; i < kQuarter * 4 + 4; ++i) {
      const float* line = w + t * b.w_tile + i * kTile;
      __builtin_prefetch(line + kTilesFar * kTileFloats, 0, 2);
      __builtin_prefetch(line + kTilesNear * kTileFloats, 0, 3);
    }
  }
}

// Tiles 0..3, of which there are kTiles, `step` floats apart.
template <int kTiles>
PYENGINE_INLINE void load_sums(const float* c, int64_t step, int64_t stride) {
  _tile_loadd(0, c, stride);
  if (kTiles > 1) _tile_loadd(1, c + step, stride);
  if (kTiles > 2) _tile_loadd(2, c + 2 * step, stride);
  if (kTiles > 3) _tile_loadd(3, c + 3 * step, stride);
}
template <int kTiles>
PYENGINE_INLINE void store_sums(float* c, int64_t step, int64_t stride) {
  _tile_stored(0, c, stride);
  if (kTiles > 1) _tile_stored(1, c + step, stride);
  if (kTiles > 2) _tile_stored(2, c + 2 * step, stride);
  if (kTiles > 3) _tile_stored(3, c + 3 * step, stride);
}
template <int kTiles>
PYENGINE_INLINE void zero_sums() {
  _tile_zero(0);
  if (kTiles > 1) _tile_zero(1);
  if (kTiles > 2) _tile_zero(2);
  if (kTiles > 3) _tile_zero(3);
}

// Two row tiles times two column tiles.
static void multiply_square(const TileBlock& b) {
  if (b.first) {
    zero_sums<4>();
  } else {
    _tile_loadd(0, b.c, b.c_stride);
    _tile_loadd(1, b.c + b.c_tile, b.c_stride);
    _tile_loadd(2, b.c + kTile, b.c_stride);
    _tile_loadd(3, b.c + b.c_tile + kTile, b.c_stride);
  }
  const float *x0 = b.x[0], *x1 = b.x[1], *w = b.w;
  for (int64_t i = 0; i < b.steps; ++i, x0 += kTileWords, x1 += kTileWords, w += kTileFloats) {
    prefetch_quarter<0, 2>(b, w);
    _tile_loadd(6, w, kTileStride);
    _tile_loadd(4, x0, b.x_stride);
    prefetch_quarter<1, 2>(b, w);
    _tile_loadd(5, x1, b.x_stride);
    _tile_dpbf16ps(0, 4, 6);
    prefetch_quarter<2, 2>(b, w);
    _tile_loadd(7, w + b.w_tile, kTileStride);
    prefetch_quarter<3, 2>(b, w);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, b.c, b.c_stride);
  _tile_stored(1, b.c + b.c_tile, b.c_stride);
  _tile_stored(2, b.c + kTile, b.c_stride);
  _tile_stored(3, b.c + b.c_tile + kTile, b.c_stride);
}

// kRows row tiles times one column tile.
template <int kRows>
static void multiply_column(const TileBlock& b) {
  b.first ? zero_sums<kRows>() : load_sums<kRows>(b.c, b.c_tile, b.c_stride);
  const float *x0 = b.x[0], *x1 = b.x[1], *x2 = b.x[2], *x3 = b.x[3], *w = b.w;
  for (int64_t k = 0; k < b.steps * kTileWords; k += kTileWords, w += kTileFloats) {
    prefetch_quarter<0, 1>(b, w);
    _tile_loadd(6, w, kTileStride);
    _tile_loadd(4, x0 + k, b.x_stride);
    _tile_dpbf16ps(0, 4, 6);
    prefetch_quarter<1, 1>(b, w);
    if (kRows > 1) _tile_loadd(5, x1 + k, b.x_stride);
    if (kRows > 1) _tile_dpbf16ps(1, 5, 6);
    prefetch_quarter<2, 1>(b, w);
    if (kRows > 2) _tile_loadd(7, x2 + k, b.x_stride);
    if (kRows > 2) _tile_dpbf16ps(2, 7, 6);
    prefetch_quarter<3, 1>(b, w);
    if (kRows > 3) _tile_loadd(4, x3 + k, b.x_stride);
    if (kRows > 3) _tile_dpbf16ps(3, 4, 6);
  }
  store_sums<kRows>(b.c, b.c_tile, b.c_stride);
}

// One row tile times kCols column tiles, two or four.
template <int kCols>
static void multiply_row(const TileBlock& b) {
  b.first ? zero_sums<kCols>() : load_sums<kCols>(b.c, kTile, b.c_stride);
  const float *x = b.x[0], *w = b.w;
  for (int64_t i = 0; i < b.steps; ++i, x += kTileWords, w += kTileFloats) {
    prefetch_quarter<0, kCols>(b, w);
    _tile_loadd(6, w, kTileStride);
    _tile_loadd(4, x, b.x_stride);
    prefetch_quarter<1, kCols>(b, w);
    _tile_loadd(7, w + b.w_tile, kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    prefetch_quarter<2, kCols>(b, w);
    if (kCols > 2) _tile_loadd(6, w + 2 * b.w_tile, kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    prefetch_quarter<3, kCols>(b, w);
    if (kCols > 2) _tile_loadd(7, w + 3 * b.w_tile, kTileStride);
    if (kCols > 2) _tile_dpbf16ps(2, 4, 6);
    if (kCols > 2) _tile_dpbf16ps(3, 4, 7);
  }
  store_sums<kCols>(b.c, kTile, b.c_stride);
}

// Up to four sums: see most_columns.
static void multiply_tile_block(const TileBlock& b, int64_t row_tiles, int64_t col_tiles) {
  if (row_tiles == 1) {
    col_tiles == 4   ? multiply_row<4>(b)
    : col_tiles == 2 ? multiply_row<2>(b)
                     : multiply_column<1>(b);
  } else if (row_tiles == 2) {
    col_tiles == 2 ? multiply_square(b) : multiply_column<2>(b);
  } else {
    row_tiles == 3 ? multiply_column<3>(b) : multiply_column<4>(b);
  }
}
static int64_t most_columns(int64_t row_tiles) {
  return row_tiles == 1 ? 4 : row_tiles == 2 ? 2 : 1;
}

static int64_t padded_words_tiles(int64_t in_features) {
  return (in_features + 2 * kTileWords - 1) / (2 * kTileWords) * kTileWords;
}

// Rows are read as they lie if they are whole tiles.
static int64_t prepared_words_tiles(int64_t in_features) {
  return in_features % (2 * kTileWords) == 0 ? 0 : padded_words_tiles(in_features);
}

static void prepare_tiles(const void* x, int64_t rows, int64_t in_features, void* out) {
  const size_t bytes = static_cast<size_t>(in_features) * 2;
  const size_t padded = static_cast<size_t>(padded_words_tiles(in_features)) * 4;
  for (int64_t r = 0; r < rows; ++r) {
    char* to = static_cast<char*>(out) + static_cast<size_t>(r) * padded;
    __builtin_memcpy(to, static_cast<const char*>(x) + static_cast<size_t>(r) * bytes, bytes);
    __builtin_memset(to + bytes, 0, padded - bytes);
  }
}

static int64_t scratch_floats_tiles(int64_t, int64_t rows, int64_t cols) {
  const int64_t padded_rows = (rows + kTileRowsAmx - 1) / kTileRowsAmx * kTileRowsAmx;
  const int64_t padded_cols = (cols + kTile - 1) / kTile * kTile;
  return padded_cols * (padded_rows + kBlockWordsAmx) + 4 * kTileFloats;
}

static void run_tiles(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                      float* scratch) {
  const int64_t rows = row1 - row0, cols = col1 - col0;
  const int64_t words = LayerBf16::words(j.in_features);
  const int64_t col_tiles = (cols + kTile - 1) / kTile, ldc = col_tiles * kTile;
  const int64_t row_tiles = (rows + kTileRowsAmx - 1) / kTileRowsAmx;
  const bool is_packed = j.layout == ops::WeightLayout::packed;
  float* sums = scratch;
  float* tails = sums + row_tiles * kTileRowsAmx * ldc;  // the last words of up to 4 column tiles
  float* packed = tails + 4 * kTileFloats;
  const float* base = is_packed ? static_cast<const float*>(j.w) + col0 * words : packed;
  const float* x = static_cast<const float*>(j.x) + row0 * j.x_stride;

  // The last tile ends with the last row: the rows that it shares with the one before it come out
  // the same, in sums of its own.
  auto first_row = [&](int64_t tile) {
    return rows < kTileRowsAmx ? 0 : smaller(tile * kTileRowsAmx, rows - kTileRowsAmx);
  };
  // Few rows read all their weights once; more are better off with squares of sums.
  const int64_t group = is_packed && row_tiles <= kRowTilesAtOnce ? kRowTilesAtOnce : 2;
  // Words [k0, k0 + count) of all columns for `group` row tiles from t on; c: their sums.
  auto multiply = [&](int64_t k0, int64_t count, int64_t t, float* c) {
    const int64_t rows_at_once = smaller(row_tiles - t, group);
    const int64_t most = most_columns(rows_at_once);
    TileBlock b;
    b.w_tile = (is_packed ? words : count) * kTile;
    for (int64_t i = 0; i < kRowTilesAtOnce; ++i) {
      b.x[i] = x + first_row(smaller(t + i, row_tiles - 1)) * j.x_stride + k0;
    }
    b.x_stride = j.x_stride * 4;
    b.c_tile = kTileRowsAmx * ldc;
    b.c_stride = ldc * 4;
    const int64_t steps = count / kTileWords, whole = steps * kTileWords;
    for (int64_t at = 0, tiles; at < col_tiles; at += tiles) {
      const int64_t left = col_tiles - at;
      tiles = left >= most ? most : left >= 2 ? 2 : 1;
      b.w = base + at * b.w_tile + (is_packed ? k0 * kTile : 0);
      b.c = c + at * kTile;
      b.steps = steps;
      b.first = k0 == 0;
      b.from_memory = is_packed && t == 0;
      if (steps > 0) multiply_tile_block(b, rows_at_once, tiles);
      if (whole == count) continue;
      for (int64_t i = 0; i < tiles; ++i) {
        float* to = tails + i * kTileFloats;
        __builtin_memcpy(to, b.w + i * b.w_tile + whole * kTile,
                         static_cast<size_t>(count - whole) * kTileStride);
        __builtin_memset(to + (count - whole) * kTile, 0,
                         static_cast<size_t>(kTileWords - (count - whole)) * kTileStride);
      }
      written();
      TileBlock rest = b;
      rest.w = tails;
      rest.w_tile = kTileFloats;
      for (const float*& row : rest.x) row += whole;
      rest.steps = 1;
      rest.first = b.first && steps == 0;
      multiply_tile_block(rest, rows_at_once, tiles);
    }
  };
  auto finish = [&](int64_t t, float* c) {
    const int64_t end = smaller((t + group) * kTileRowsAmx, rows);
    for (int64_t r = t * kTileRowsAmx; r < end; ++r) {
      const int64_t tile = r / kTileRowsAmx;
      const int64_t line = (tile - t) * kTileRowsAmx + r - first_row(tile);
      finish_row(j, row0 + r, col0, cols, c + line * ldc);
    }
  };

  configure_tiles(smaller(rows, kTileRowsAmx));
  if (is_packed) {
    // Two row tiles of x lie in an L1 while all columns of a block pass by.
    const int64_t block = row_tiles <= group ? words : kBlockWordsAmx;
    for (int64_t t = 0; t < row_tiles; t += group) {
      for (int64_t k0 = 0; k0 < words; k0 += block) {
        multiply(k0, smaller(block, words - k0), t, sums);
      }
      finish(t, sums);
    }
  } else {
    for (int64_t k0 = 0; k0 < words; k0 += kBlockWordsAmx) {
      const int64_t count = smaller(kBlockWordsAmx, words - k0);
      pack<LayerBf16>(j, k0, count, col0, col_tiles * kTile, packed, count);
      written();
      for (int64_t t = 0; t < row_tiles; t += group) {
        multiply(k0, count, t, sums + t * kTileRowsAmx * ldc);
      }
    }
    for (int64_t t = 0; t < row_tiles; t += group) finish(t, sums + t * kTileRowsAmx * ldc);
  }
  _tile_release();
}

}  // namespace

const DenseKernels& dense_bf16() {
  static constexpr DenseKernels kernels = {prepared_words_tiles, prepare_tiles,
                                           scratch_floats_tiles, run_tiles,
                                           pack<LayerBf16>,      2 * kTile};
  return kernels;
}

}  // namespace pyengine::cpu::PYENGINE_ISA

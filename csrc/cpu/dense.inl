// Dense layers: y = x w, every element reduced in the one order of ops.h, whatever the number of
// rows.
//
// Lanes always run over output columns, so an element is one lane's chain over k: 256 k's from
// zero, then added to the sum of the blocks before. Weights are read in the packed layout
// (ops/types.h). Those that are not packed yet, a block of k of the item's columns at a time is
// packed into scratch: the same words in the same order, hence the same bits.
//
// The unit of work is a panel, kTileVectors vectors of columns, times kTileRows rows: as many sums
// as there are registers. A `Layer` (dense_f32.inl, dense_bf16.inl) says what one word of packed
// weights adds to them.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kPanel = kTileVectors * kLanes;  // columns of a panel

constexpr int64_t kTile = ops::kTileColumns;
// Items start at a multiple of this: of whole panels and of whole tiles.
constexpr int64_t kItemColumns = kPanel > kTile ? kPanel : kTile;
constexpr int64_t kFewRows = 64;   // up to here weights come from memory, not from a cache
constexpr int64_t kRowsAhead = 8;  // rows of (K, N) weights to prefetch while one is packed

static_assert(kTile % kLanes == 0, "a vector lies within a tile");
static_assert(kItemColumns % kPanel == 0 && kItemColumns % kTile == 0, "see kItemColumns");
static_assert(kMaxItemColumns % kItemColumns == 0, "an item is whole panels");

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
      if (j.out != nullptr) {
        copy_f32(y, count, static_cast<float*>(j.out) + row * j.out_stride + channel);
      }
    } else {
      const int64_t head = channel / kv.head_dim, d0 = channel % kv.head_dim;
      count = smaller(n, kv.head_dim - d0);
      char* key = block + head * kv.key_bytes;
      char* value = block + kv.values_at + head * kv.value_bytes;
      if (kv.dtype == DType::i8) {  // items are whole heads
        part == 1 ? quantize_key(y, count, slot, key)
                  : quantize_value(y, count, kv.head_dim_v, slot, value);
      } else if (part == 1 && kv.dtype == DType::bf16) {
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

// The largest of each kLogitBlock values; NaN where one is not finite.
static void store_block_max(const float* y, int64_t n, float* block_max) {
  for (int64_t block = 0; block < n; block += ops::kLogitBlock) {
    Vf highest = set1(-__builtin_inff()), bad = zero();
    const int64_t end = smaller(block + ops::kLogitBlock, n);
    for (int64_t i = block; i < end; i += kLanes) {
      const int lanes = static_cast<int>(smaller(end - i, kLanes));
      highest = max(keep_first(load(y + i), lanes, highest), highest);
      bad = fma(load_upto(y + i, lanes), zero(), bad);
    }
    *block_max++ = max_of(highest) + sum(bad);
  }
}

// y holds columns [col, col + n) of x w for one row, padded to whole vectors.
static void activate_row(const DenseJob& j, int64_t col, int64_t n, float* y) {
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
}

// The same, to where it belongs.
static void finish_row(const DenseJob& j, int64_t row, int64_t col, int64_t n, float* y) {
  activate_row(j, col, n, y);
  const int64_t at = (row - j.out_row0) * j.out_stride + (col - j.out_col0);
  switch (j.store) {
    case Store::f32:
      copy_f32(y, n, static_cast<float*>(j.out) + at);
      if (j.block_max != nullptr) {
        store_block_max(y, n, j.block_max + row * j.block_max_stride + col / ops::kLogitBlock);
      }
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
    case Store::quantized:  // dense_quant.inl
      break;
  }
}

// ---- Packing ----------------------------------------------------------------------------------

// (N, K) weights: squares of words, transposed. See DenseKernels::pack for the arguments.
template <class Layer>
static void pack_squares(const DenseJob& j, int64_t word0, int64_t words, int64_t col0,
                         int64_t cols, float* dst, int64_t tile_words) {
  for (int64_t i = 0; i < cols; i += kLanes) {
    float* out = dst + i / kTile * tile_words * kTile + i % kTile;
    const int64_t valid = smaller(kLanes, j.out_features - (col0 + i));
    for (int64_t k = 0; k < words; k += kLanes) {
      Vf t[kLanes];
      if (valid <= 0) {
        for (int l = 0; l < kLanes; ++l) t[l] = zero();
      } else {
        Layer::load_square(j, col0 + i, valid, word0 + k, t);
        transpose(t);
      }
      const int64_t rows = smaller(kLanes, words - k);
      for (int64_t l = 0; l < rows; ++l) store(out + (k + l) * kTile, t[l]);
    }
  }
}

template <class Layer>
static void pack(const DenseJob& j, int64_t word0, int64_t words, int64_t col0, int64_t cols,
                 float* dst, int64_t tile_words) {
  if (j.layout == ops::WeightLayout::in_out) {
    Layer::pack_in_out(j, word0, words, col0, cols, dst, tile_words);
  } else {
    pack_squares<Layer>(j, word0, words, col0, cols, dst, tile_words);
  }
}

// ---- Panels -----------------------------------------------------------------------------------

// What is asked of memory while a tile is computed, one line at a time.
enum class Ahead : uint8_t {
  nothing,
  same,   // the words kWordsAhead further on in the columns being read
  words,  // whole words of the panel that is next
  both,   // lines of one of its tiles, and the rows of x that the next pass reads
};

constexpr int64_t kWordsAhead = 24;

struct PanelTile {
  const float* x;  // rows of the block, ldx apart
  int64_t ldx;
  const float* w;                  // the block's words of the first vector's columns
  int64_t w_offset[kTileVectors];  // from there to those of the others
  int64_t words;
  float* c;  // c[r][0, kPanel) (+)= the block's chains
  int64_t ldc;
  bool first_block;
  const float* ahead;  // the weights that are asked for first
  int64_t ahead_step;  // Ahead::words: words to compute for each; Ahead::both: floats to the next
  const int64_t* next_rows;  // Ahead::both: from x to the lines of the next rows
};

template <class Layer, Ahead kAhead, int kRows>
static void multiply_tile(const PanelTile& t) {
  Vf acc[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) acc[r][v] = zero();
  }
  const float* x = t.x;
  const float* w = t.w;
  const int64_t ldx = t.ldx;
  int64_t offset[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) offset[v] = t.w_offset[v];
  const float* ahead = t.ahead;
  const int64_t ahead_step = t.ahead_step;
  const int64_t* next_row = t.next_rows;
  auto one_word = [&]() __attribute__((always_inline)) {
    Vf word[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      word[v] = load(w + offset[v]);
      if (kAhead == Ahead::same && v * kLanes % kTile == 0) {
        __builtin_prefetch(w + offset[v] + kWordsAhead * kTile, 0, 3);
      }
    }
    Layer::template multiply_add<kRows>(acc, x, ldx, word);
    w += kTile;
    x += Layer::kInputsPerWord;
  };
  const float* end = w + t.words * kTile;
  if (kAhead == Ahead::words) {
    while (w != end) {
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) {
        if (v * kLanes % kTile == 0) __builtin_prefetch(ahead + offset[v], 0, 2);
      }
      ahead += kTile;
      for (int64_t n = smaller(ahead_step, (end - w) / kTile); n > 0; --n) one_word();
    }
  } else if (kAhead == Ahead::both) {
    for (int64_t n = t.words / 2; n > 0; --n) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
      one_word();
#pragma GCC unroll 2
      for (int i = 0; i < Layer::kInputsPerWord; ++i) __builtin_prefetch(t.x + next_row[i], 0, 2);
      next_row += Layer::kInputsPerWord;
      one_word();
    }
    if (t.words % 2 != 0) one_word();
  } else {
    while (w != end) one_word();
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      float* p = t.c + r * t.ldc + v * kLanes;
      store(p, t.first_block ? acc[r][v] : add(load(p), acc[r][v]));
    }
  }
}

template <class Layer, Ahead kAhead, int kRows = kTileRows>
PYENGINE_INLINE void multiply_rows(int64_t rows, const PanelTile& t) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<Layer, kAhead, kRows>(t);
    } else {
      multiply_rows<Layer, kAhead, kRows - 1>(rows, t);
    }
  }
}

// One block of one panel for all `rows`. `next`: the words that will be read after these, or null
// if they are near already; as far apart as those of t.w.
template <class Layer>
static void multiply_panel(PanelTile t, int64_t rows, const float* next) {
  if (rows <= kTileRows) {
    next != nullptr ? multiply_rows<Layer, Ahead::same>(rows, t)
                    : multiply_rows<Layer, Ahead::nothing>(rows, t);
    return;
  }
  // Memory should be busy all the time: each pass asks for its share of the words that are next.
  const bool is_few = rows <= kFewRows;
  const int64_t passes = (rows + kTileRows - 1) / kTileRows;
  for (int64_t pass = 0, r = 0; pass < passes; ++pass) {
    const int64_t end = rows * (pass + 1) / passes;
    if (end - r == kTileRows && !is_few) {
      constexpr int64_t kLines = kPanel > kTile ? kPanel / kTile : 1;  // cache lines of one word
      const int64_t line = pass / 2;  // two passes, half its words each
      const bool has_share = next != nullptr && line < kLines;
      t.ahead = has_share ? next + t.w_offset[line] + pass % 2 * t.words / 2 * kTile : t.w;
      t.ahead_step = has_share ? kTile : 0;
      multiply_tile<Layer, Ahead::both, kTileRows>(t);
    } else if (next != nullptr) {
      t.ahead = next + pass * ((t.words + passes - 1) / passes) * kTile;
      t.ahead_step = passes;
      multiply_rows<Layer, Ahead::words>(end - r, t);
    } else {
      multiply_rows<Layer, Ahead::nothing>(end - r, t);
    }
    t.x += (end - r) * t.ldx;
    t.c += (end - r) * t.ldc;
    r = end;
  }
}

// ---- One item ---------------------------------------------------------------------------------

template <class Layer>
static int64_t scratch_floats(int64_t, int64_t rows, int64_t cols) {
  const int64_t padded = (cols + kItemColumns - 1) / kItemColumns * kItemColumns;
  return padded * (rows + Layer::kBlockWords);
}

template <class Layer>
static void run_dense(const DenseJob& j, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                      float* scratch) {
  const int64_t rows = row1 - row0, cols = col1 - col0;
  const int64_t words = Layer::words(j.in_features);
  const int64_t panels = (cols + kPanel - 1) / kPanel, ldc = panels * kPanel;
  const bool is_packed = j.layout == ops::WeightLayout::packed;
  float* c = scratch;
  float* packed = scratch + rows * ldc;
  const float* base = is_packed ? static_cast<const float*>(j.w) + col0 * words : packed;

  // Lines of kTileRows rows, one for each two floats of a row that are read.
  int64_t next_rows[Layer::kBlockWords * Layer::kInputsPerWord / 2];
  for (int64_t i = 0, line = 16; i < Layer::kBlockWords * Layer::kInputsPerWord / 2; ++i) {
    const int64_t per_row = Layer::kBlockWords * Layer::kInputsPerWord / line;
    next_rows[i] = (kTileRows + i / per_row % kTileRows) * j.x_stride + i % per_row * line;
  }

  auto block_of_panel = [&](int64_t k0, int64_t p) {
    const int64_t count = smaller(Layer::kBlockWords, words - k0);
    const int64_t tile_words = is_packed ? words : count;
    // The words of column `col` of the item.
    auto words_of = [&](int64_t col) {
      return base + col / kTile * tile_words * kTile + col % kTile + (is_packed ? k0 * kTile : 0);
    };
    PanelTile t;
    t.x = static_cast<const float*>(j.x) + row0 * j.x_stride + k0 * Layer::kInputsPerWord;
    t.ldx = j.x_stride;
    t.w = words_of(p * kPanel);
    for (int v = 0; v < kTileVectors; ++v) {
      // Vectors beyond the last tile read the panel's first: nobody sees their sums.
      const int64_t col = p * kPanel + v * kLanes;
      t.w_offset[v] = col < cols ? words_of(col) - t.w : 0;
    }
    t.words = count;
    t.c = c + p * kPanel;
    t.ldc = ldc;
    t.first_block = k0 == 0;
    t.next_rows = next_rows;
    const float* next = t.w + count * kTile;  // the next block
    if (k0 + count == words) next = words_of((p + 1) * kPanel) - k0 * kTile;
    const bool is_last = k0 + count == words && p + 1 == panels && rows > kTileRows;
    multiply_panel<Layer>(t, rows, is_packed && !is_last ? next : nullptr);
  };

  if (is_packed && rows <= kFewRows) {
    for (int64_t p = 0; p < panels; ++p) {  // columns as they lie: long runs of memory
      for (int64_t k0 = 0; k0 < words; k0 += Layer::kBlockWords) block_of_panel(k0, p);
    }
  } else {
    for (int64_t k0 = 0; k0 < words; k0 += Layer::kBlockWords) {  // x stays in a cache
      if (!is_packed) {
        const int64_t count = smaller(Layer::kBlockWords, words - k0);
        const int64_t tiles = (cols + kTile - 1) / kTile;
        pack<Layer>(j, k0, count, col0, tiles * kTile, packed, count);
      }
      for (int64_t p = 0; p < panels; ++p) block_of_panel(k0, p);
    }
  }
  for (int64_t r = 0; r < rows; ++r) finish_row(j, row0 + r, col0, cols, c + r * ldc);
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The products of attention_i8.inl in AMX tiles, for items of several rows: the same integers.
//
// A block's keys are 16 tokens of 64 channels for each kilobyte: a B tile as it lies. The values of
// four blocks are copied together, 64 tokens of 16 channels being a tile. High and low bytes of
// queries and weights are tiles of their own.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

// Tiles 0 to 3 hold sums: high and low of one B tile, then of another. 4 and 5 are high and low
// bytes, 6 and 7 keys or values.
struct alignas(64) I8TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit I8TileConfig(int group_rows) {
    for (int t = 0; t < 8; ++t) {
      row_bytes[t] = 64;
      rows[t] = static_cast<uint8_t>(t >= 6 ? 16 : group_rows);
    }
  }
};

class AmxI8Tiles {
 public:
  static constexpr int kMaxRows = 32;
  static bool take(int rows, int64_t head_dim) { return rows > kI8Rows && head_dim % 64 == 0; }
  static int64_t scratch_words(int64_t channels) {
    return 2 * kSums + ops::kKeySegment / 4 * channels;
  }
  PYENGINE_INLINE Vf exp2(Vf x) { return exp2_rough(x); }

  explicit AmxI8Tiles(int32_t* scratch) : sums_(scratch), values_(scratch + 2 * kSums) {}

  void begin(int rows) {
    const I8TileConfig config(rows);
    _tile_loadconfig(&config);
  }
  void end() { _tile_release(); }

  // Scores of a group's rows for the first blocks of a piece. The sums of two blocks are scaled
  // while the next ones are multiplied: what a tile has just stored is not to be had at once.
  void score(const WideQueries& q, int unit, int rows, const I8Piece& piece, int blocks,
             float* scores) {
    const char* high = reinterpret_cast<const char*>(q.of(unit));
    const char* low = high + q.half * 4;
    const int64_t stride = q.stride * 4, chunks = q.half / 16;
    auto scale = [&](int b) __attribute__((always_inline)) {
      const int32_t* sums = sums_ + b / 2 % 2 * kSums;
      const Vf first = load(reinterpret_cast<const float*>(piece.block[b]));
      const Vf second = load(reinterpret_cast<const float*>(piece.block[b + 1]));
      for (int r = 0; r < rows; ++r) {
        const Vf of_query = q.scale(unit + r);
        const Vi offset = q.offset(unit + r);
        float* to = scores + r * ops::kKeySegment + b * 16;
        store(to, I8Attention<AmxI8Tiles>::score_of(total(sums, r), offset, first, of_query));
        store(to + 16, I8Attention<AmxI8Tiles>::score_of(total(sums + kSums / 2, r), offset, second,
                                                         of_query));
      }
    };
    for (int b = 0; b < blocks; b += 2) {
      const char* first = piece.block[b] + kI8Scales;
      const char* second = piece.block[b + 1] + kI8Scales;  // of a pair, there is always memory
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t c = 0; c < chunks; ++c) {
        _tile_loadd(4, high + c * 64, stride);
        _tile_loadd(5, low + c * 64, stride);
        _tile_loadd(6, first + c * 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, second + c * 1024, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
      if (b > 0) scale(b - 2);
      store_sums(sums_ + b / 2 % 2 * kSums);
    }
    scale((blocks - 1) / 2 * 2);
  }

  // The first blocks' values to [token / 4][channel][4] of the whole piece.
  void load_values(const I8Piece& piece, int blocks, int64_t channels) {
    for (int b = 0; b < blocks; ++b) {
      const char* from = piece.block[b] + kI8Scales;
      int32_t* to = values_ + b * 4 * channels;
      for (int64_t i = 0; i < 4 * channels; i += 16) store_words(to + i, load_words(from + i * 4));
    }
  }

  void add(const WideWeights& w, int row0, int rows, int keys, int64_t channels, float* out) {
    const char* high = reinterpret_cast<const char*>(w.of(row0));
    const char* low = high + kWeightHalf * 4;
    constexpr int64_t kStride = 2 * kWeightHalf * 4;
    for (int64_t d = 0; d < channels; d += 32) {
      const char* values = reinterpret_cast<const char*>(values_ + d);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t at = 0; at < keys; at += 64) {
        _tile_loadd(4, high + at, kStride);
        _tile_loadd(5, low + at, kStride);
        _tile_loadd(6, values + at * channels, channels * 4);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, values + at * channels + 64, channels * 4);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
      store_sums(sums_);
      for (int r = 0; r < rows; ++r) {
        const Vi offset = set1(w.offset[row0 + r]);
        const Vf step = set1(w.step[row0 + r]);
        for (int i = 0; i < 2; ++i) {
          const Vi sum = cpu::PYENGINE_ISA::add(total(sums_ + i * kSums / 2, r), offset);
          store(out + r * channels + d + i * 16, mul(to_float(sum), step));
        }
      }
    }
  }

 private:
  static constexpr int64_t kSums = 4 * 256;

  static void store_sums(int32_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
  // Of one B tile: high, then low.
  static Vi total(const int32_t* sums, int row) {
    return cpu::PYENGINE_ISA::add(shift_left<8>(load_words(sums + row * 16)),
                                  load_words(sums + 256 + row * 16));
  }

  int32_t* sums_;    // 2 x [2][high, low][16][16]
  int32_t* values_;  // [64][channels]: words of four tokens
};

}  // namespace

const AttentionKernels& attention_i8() {
  static constexpr AttentionKernels table = i8_attention_kernels<AmxI8Tiles>();
  return table;
}

}  // namespace pyengine::cpu::PYENGINE_ISA

// Attention over an i8 cache, in products of integers; the frame is attention.inl.
//
// Queries and probabilities are rounded to 16 bits, keys and values are 8 bits as they lie:
//   q = round(x / u), u = max |x| / 32512 of a row's head
//   s = (u scale) key_scale i,  i = sum over channels of q (128 + k) - 128 sum of q
//   w = round(p value_scale / t), t = the largest value_scale that the row sees in the segment /
//   32512 o = t i,  i = sum over tokens of w (128 + v) - 128 sum of w
// Sums of integers are exact: vpdpbusd, AMX tiles and 16-bit products give the same bits, however
// rows, tokens and channels are cut. A token that a row does not see weighs 0, whatever lies there.
// What is not finite shows in the scales, which are multiplied as floats.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kI8Blocks = ops::kKeySegment / 16;
constexpr int kI8Rows = kLanes == 16 ? 4 : 2;  // of a group
constexpr int kI8Groups = 4;                   // of an item
constexpr int64_t kI8Scales = 64;              // bytes before a head's integers
constexpr float kWideMost = 32512.0f;  // 127 * 256: the high byte of such a number is signed
constexpr int64_t kWeightHalf = ops::kKeySegment / 4;
using I8Piece = Piece<kI8Blocks>;

static_assert(kI8Rows * kI8Groups <= kMaxAttentionRows, "");

// Row r of the integers for unit u: [half] words, [half] words (store_wide), u scale, -128 sum q.
struct WideQueries {
  int32_t* data;
  int64_t half, stride;  // words

  int32_t* of(int unit) const { return data + unit * stride; }
  Vf scale(int unit) const { return as_float(set1(of(unit)[2 * half])); }
  Vi offset(int unit) const { return set1(of(unit)[2 * half + 1]); }
};

// The probabilities of one head's rows in a segment.
struct WideWeights {
  int32_t* data;  // [row][2][kWeightHalf]
  float step[kMaxAttentionRows];
  int32_t offset[kMaxAttentionRows];

  int32_t* of(int row) const { return data + row * 2 * kWeightHalf; }
};

// A processor without tiles.
struct NoTiles {
  static constexpr int kMaxRows = kI8Rows * kI8Groups;
  static bool take(int, int64_t) { return false; }
  static int64_t scratch_words(int64_t) { return 0; }
  PYENGINE_INLINE Vf exp2(Vf x) { return exp2_nonpositive(x); }

  explicit NoTiles(int32_t*) {}
  void begin(int) {}
  void end() {}
  void score(const WideQueries&, int, int, const I8Piece&, int, float*) {}
  void load_values(const I8Piece&, int, int64_t) {}
  void add(const WideWeights&, int, int, int, int64_t, float*) {}
};

template <class Tiles>
class I8Attention {
 public:
  I8Attention(AttentionState& s, int32_t* scratch)
      : s_(s),
        tiled_(Tiles::take(s.item.num_rows, s.job.kv.head_dim)),
        tiles_(scratch + s.rows * 2 * kWeightHalf),
        query_{reinterpret_cast<int32_t*>(s.query), s.job.kv.head_dim_v / 4, s.query_stride} {
    weights_.data = scratch;
  }

  static int rows_of(int num_rows, int64_t head_dim) {
    if (!Tiles::take(num_rows, head_dim)) return padded_rows(num_rows, kI8Rows);
    return num_rows <= 16 ? num_rows : padded_rows(num_rows, 16);
  }
  static int64_t scratch_words(const AttentionJob& j, int rows) {
    return rows * 2 * kWeightHalf + Tiles::scratch_words(j.kv.head_dim_v);
  }

  void run() {
    for (int u = 0; u < s_.units; ++u) round_query(u);
    if (tiled_) tiles_.begin(group_rows());
    for_each_segment(s_, [this](int segment, int num_keys) {
      walk_segment<kI8Blocks>(
          s_, segment, num_keys,
          [this](int head, int, const I8Piece& piece, const I8Piece& ahead) {
            score(head, piece, ahead);
          },
          [] {},
          [this](int head, int, const I8Piece& piece, const I8Piece& ahead) {
            weigh(head, piece);
            add_values(head, piece, ahead);
          });
    });
    if (tiled_) tiles_.end();
  }

 private:
  static constexpr int kFetchDistance = 8;  // blocks: 9 KB of 64 channels

  int group_rows() const { return s_.rows < 16 ? s_.rows : 16; }  // of tiles
  int blocks_seen() const { return (s_.keys[s_.rows - 1] + 15) / 16; }

  void round_query(int u) {
    const int64_t n = s_.job.kv.head_dim;
    const float* q = query_of(s_, u);
    Vf highest = zero();
    for (int64_t d = 0; d < n; d += kLanes) highest = max(highest, abs(load_upto(q + d, n - d)));
    const float most = max_of(highest);
    const Vf inverse = set1(most > 1e-33f ? kWideMost / most : 0.0f);
    int32_t* out = query_.of(u);
    Vf total = zero();  // of whole numbers below 2^24, or NaN: infinity times zero is that too
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vf shifted = add(mul(load_upto(q + d, n - d), inverse), set1(kRoundingShift));
      total = add(total, sub(shifted, set1(kRoundingShift)));
      store_wide(out, query_.half, d, shifted_word(shifted));
    }
    const float whole = sum(total);
    const bool finite = whole - whole == 0.0f;
    const float scale = most * (1.0f / kWideMost) * s_.job.scale + 0.0f * whole;
    __builtin_memcpy(out + 2 * query_.half, &scale, 4);
    out[2 * query_.half + 1] = finite ? -128 * static_cast<int32_t>(whole) : 0;
  }

  static constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  PYENGINE_INLINE Vi shifted_word(Vf shifted) {
    return sub_words(as_int(shifted), as_int(set1(kRoundingShift)));
  }

  // ---- q k ----

  void score(int head, const I8Piece& piece, const I8Piece& ahead) {
    const int unit0 = head * s_.rows, blocks = blocks_seen();
    float* scores = s_.scores + int64_t{unit0} * ops::kKeySegment;
    if (tiled_) {
      fetch(piece, ahead, 0, blocks);
      for (int row0 = 0; row0 < s_.rows; row0 += group_rows()) {
        const int seen = (s_.keys[row0 + group_rows() - 1] + 15) / 16;
        tiles_.score(query_, unit0 + row0, group_rows(), piece, seen,
                     scores + row0 * ops::kKeySegment);
      }
      return;
    }
    if (s_.rows == 1) return score_group<1, 4>(unit0, s_.keys[0], piece, &ahead, scores);
    for (int row0 = 0; row0 < s_.rows; row0 += kI8Rows) {
      score_group<kI8Rows, 2>(unit0 + row0, s_.keys[row0 + kI8Rows - 1], piece,
                              row0 == 0 ? &ahead : nullptr, scores + row0 * ops::kKeySegment);
    }
  }

  template <int kRows, int kVectors>
  void score_group(int unit, int keys, const I8Piece& piece, const I8Piece* ahead, float* scores) {
    constexpr int kTokens = kVectors * kLanes;
    int key = 0;
    for (; keys - key > kTokens - kLanes; key += kTokens) {
      if (ahead != nullptr) fetch_tokens(piece, *ahead, key, kTokens);
      score_vectors<kRows, kVectors>(unit, piece, key, scores);
    }
    for (; key < keys; key += kLanes) {
      if (ahead != nullptr) fetch_tokens(piece, *ahead, key, kLanes);
      score_vectors<kRows, 1>(unit, piece, key, scores);
    }
  }

  template <int kRows, int kVectors>
  void score_vectors(int unit, const I8Piece& piece, int key, float* scores) {
    const char* p[kVectors];
    WideSum acc[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = key + v * kLanes;
      p[v] = piece.block[at / 16] + kI8Scales + at % 16 * 4;
    }
    const int32_t* q = query_.of(unit);
    const int64_t words = (s_.job.kv.head_dim + 3) / 4, half = query_.half, stride = query_.stride;
    for (int64_t i = 0; i < words; ++i) {
      Bytes b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = bytes(load_words(p[v] + i * 64));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const WideInputs x = wide_inputs(q + r * stride + i, half);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) wide_dot(acc[r][v], b[v], x);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vf scale = query_.scale(unit + r);
      const Vi offset = query_.offset(unit + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int at = key + v * kLanes;
        const Vf key_scale = load(reinterpret_cast<const float*>(piece.block[at / 16]) + at % 16);
        store(scores + r * ops::kKeySegment + at,
              score_of(wide_total(acc[r][v]), offset, key_scale, scale));
      }
    }
  }

 public:
  PYENGINE_INLINE Vf score_of(Vi sum, Vi offset, Vf key_scale, Vf scale) {
    return mul(to_float(add(sum, offset)), mul(key_scale, scale));
  }

 private:
  // What will be read some blocks after blocks [begin, end) of a piece. Of the next piece, all
  // scales are read before its integers.
  void fetch(const I8Piece& piece, const I8Piece& next, int begin, int end) const {
    const int blocks = blocks_seen(), distance = blocks < kFetchDistance ? blocks : kFetchDistance;
    const int64_t lines = s_.job.kv.head_dim_v / 4;
    for (int b = begin; b < end; ++b) {
      const int at = b + distance;
      const char* from = (at < blocks ? piece.block[at] : next.block[at - blocks]) + kI8Scales;
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * 64, 0, 3);
      __builtin_prefetch(next.block[b], 0, 3);
    }
  }
  void fetch_tokens(const I8Piece& piece, const I8Piece& next, int key, int tokens) const {
    const int end = (key + tokens) / 16, blocks = blocks_seen();
    fetch(piece, next, key / 16, end < blocks ? end : blocks);
  }

  // ---- softmax ----

  void weigh(int head, const I8Piece& piece) {
    const int end = (s_.keys[s_.rows - 1] + 63) / 64 * 64;
    int scaled_keys = 0;  // whose value scales `step` is made of
    float step = 0.0f, inverse = 0.0f;
    for (int row = 0; row < s_.rows; ++row) {
      const int unit = head * s_.rows + row, keys = s_.keys[row];
      if (keys != scaled_keys) {
        find_step(piece, keys, &step, &inverse);
        scaled_keys = keys;
      }
      weights_.step[row] = step;
      fetch_next_query(s_, unit);
      weigh_row(row, unit, piece, end, inverse);
    }
  }

  // The step of a row's weights, and its inverse.
  static void find_step(const I8Piece& piece, int keys, float* step, float* inverse) {
    Vf highest = zero(), bad = zero();
    for (int i = 0; i < keys; i += kLanes) {
      const Vf scale = keep_first(value_scales(piece, i), keys - i, zero());
      highest = max(highest, scale);
      bad = fma(scale, zero(), bad);
    }
    const float most = max_of(highest);
    *step = most * (1.0f / kWideMost) + sum(bad);
    *inverse = most > 1e-33f ? kWideMost / most : 0.0f;
  }

  PYENGINE_INLINE Vf value_scales(const I8Piece& piece, int token) {
    return load(reinterpret_cast<const float*>(piece.block[token / 16]) + token % 16);
  }

  void weigh_row(int row, int unit, const I8Piece& piece, int end, float inverse) {
    const int keys = s_.keys[row], whole = keys / kLanes * kLanes;
    float* s = s_.scores + int64_t{unit} * ops::kKeySegment;
    const Vf minus_infinity = set1(-__builtin_inff());
    Vf best[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
    int i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) best[v] = max(best[v], load(s + i + v * kLanes));
    }
    for (; i < whole; i += kLanes) best[0] = max(best[0], load(s + i));
    if (whole < keys) {
      const Vf last = keep_first(load(s + whole), keys - whole, minus_infinity);
      store(s + whole, last);
      best[0] = max(best[0], last);
    }
    const float highest = max_of(max(max(best[0], best[1]), max(best[2], best[3])));
    int32_t* out = weights_.of(row);
    Vf total = zero();
    Vi count = set1(0);
    auto weigh_lanes = [&](int i, Vf scale) __attribute__((always_inline)) {
      const Vf e = Tiles::exp2(sub(load(s + i), set1(highest)));
      total = add(total, e);
      // NaN becomes the bound: it shows in the sum.
      const Vf w = min(mul(mul(e, scale), set1(inverse)), set1(kWideMost));
      const Vi rounded = shifted_word(add(w, set1(kRoundingShift)));
      count = add(count, rounded);
      store_wide(out, kWeightHalf, i, rounded);
    };
    for (i = 0; i < whole; i += kLanes) weigh_lanes(i, value_scales(piece, i));
    if (i < keys) {
      weigh_lanes(i, keep_first(value_scales(piece, i), keys - i, zero()));
      i += kLanes;
    }
    for (; i < end; i += kLanes) store_wide(out, kWeightHalf, i, set1(0));
    weights_.offset[row] = -128 * sum_of(count);
    s_.part_max[unit] = highest;
    s_.part_sum[unit] = sum(total);
  }

  // ---- w v ----

  void add_values(int head, const I8Piece& piece, const I8Piece& ahead) {
    const int64_t channels = s_.job.kv.head_dim_v;
    float* out = s_.part_out + int64_t{head} * s_.rows * channels;
    fetch(piece, ahead, 0, blocks_seen());
    if (tiled_) {
      tiles_.load_values(piece, blocks_seen(), channels);
      for (int row0 = 0; row0 < s_.rows; row0 += group_rows()) {
        const int keys = s_.keys[row0 + group_rows() - 1];
        if (keys > 0)
          tiles_.add(weights_, row0, group_rows(), keys, channels, out + row0 * channels);
      }
      return;
    }
    if (s_.rows == 1) return add_group<1, 4>(0, piece, out);
    for (int row0 = 0; row0 < s_.rows; row0 += kI8Rows) {
      add_group<kI8Rows, 2>(row0, piece, out + row0 * channels);
    }
  }

  template <int kRows, int kVectors>
  void add_group(int row0, const I8Piece& piece, float* out) {
    const int blocks = (s_.keys[row0 + kRows - 1] + 15) / 16;
    const int64_t channels = s_.job.kv.head_dim_v;
    int64_t d = 0;
    for (; channels - d >= kVectors * kLanes; d += kVectors * kLanes) {
      add_vectors<kRows, kVectors>(row0, piece, blocks, d, out);
    }
    for (; d < channels; d += kLanes) add_vectors<kRows, 1>(row0, piece, blocks, d, out);
  }

  template <int kRows, int kVectors>
  void add_vectors(int row0, const I8Piece& piece, int blocks, int64_t d, float* out) {
    const int64_t channels = s_.job.kv.head_dim_v;
    const int32_t* w = weights_.of(row0);
    WideSum acc[kRows][kVectors];
    for (int block = 0; block < blocks; ++block) {
      const char* p = piece.block[block] + kI8Scales + d * 4;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad, p += channels * 4, ++w) {
        Bytes b[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) b[v] = bytes(load_words(p + v * kLanes * 4));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const WideInputs x = wide_inputs(w + r * 2 * kWeightHalf, kWeightHalf);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) wide_dot(acc[r][v], b[v], x);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vf step = set1(weights_.step[row0 + r]);
      const Vi offset = set1(weights_.offset[row0 + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(out + r * channels + d + v * kLanes,
              mul(to_float(add(wide_total(acc[r][v]), offset)), step));
      }
    }
  }

  AttentionState& s_;
  const bool tiled_;
  Tiles tiles_;
  WideQueries query_;
  WideWeights weights_;
};

template <class Tiles>
static int64_t i8_attention_floats(const AttentionJob& j, int num_rows, int num_heads) {
  const int rows = I8Attention<Tiles>::rows_of(num_rows, j.kv.head_dim);
  return round_to_16(state_floats(j, rows * num_heads)) +
         I8Attention<Tiles>::scratch_words(j, rows);
}

template <class Tiles>
static void run_i8_attention(const AttentionJob& j, const AttentionItem& item, float* scratch) {
  AttentionState s{j, item};
  start(s, I8Attention<Tiles>::rows_of(item.num_rows, j.kv.head_dim), scratch);
  auto* own = reinterpret_cast<int32_t*>(scratch + round_to_16(state_floats(j, s.units)));
  I8Attention<Tiles>(s, own).run();
}

template <class Tiles>
constexpr AttentionKernels i8_attention_kernels() {
  return {Tiles::kMaxRows,         kI8Rows,     i8_attention_floats<Tiles>,
          run_i8_attention<Tiles>, part_floats, merge_attention};
}

[[maybe_unused]] constexpr AttentionKernels kAttentionI8 = i8_attention_kernels<NoTiles>();

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

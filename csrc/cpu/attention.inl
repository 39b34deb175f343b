// Attention of some query rows of one sequence, over the paged cache, for some of its heads.
//
// Keys are taken in segments of 256 (16 blocks, aligned to position 0). Each has a softmax of its
// own, in powers of two (the scale holds log2 e):
//   s = (scale q) . k, a chain over channels, lanes are keys
//   m = max s;  p = 2^(s - m);  l = sum p;  o = chain over the segment's keys of p v, from zero,
//   lanes are channels
// and segments are merged in order, into what starts as M = -infinity, L = O = 0:
//   M' = max(M, m);  a = 2^(M - M');  b = 2^(m - M');  L = L a + l b;  O = O a + o b
// At the end O / L. A row takes exactly the keys up to its own position: scores of later keys are
// replaced, never computed with (unwritten cache may hold anything), and its chain over values ends
// with its last key. So its result depends neither on the rows beside it nor on who computes which
// segment.
//
// This file holds the frame, and the two products in FMAs for each dtype of the cache.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

static_assert(kMaxHeadDim % 16 == 0, "sums hold head_dim_v channels");

// What an item computes with. A unit is one head and one row, (head - head0) * rows + row. Rows are
// padded to whole groups with copies of the last one.
struct AttentionState {
  const AttentionJob& job;
  const AttentionItem& item;
  int rows = 0;               // padded
  int units = 0;              // heads * rows
  int64_t query_stride = 0;   // floats
  float* query = nullptr;     // [unit][query_stride] scaled, padded with zeros
  float* scores = nullptr;    // [unit][kKeySegment] scores of the segment, then probabilities
  float* part_out = nullptr;  // [unit][head_dim_v] of the segment
  float* out = nullptr;       // [unit][head_dim_v] of all segments so far
  float* part_max = nullptr;  // [unit], and so on
  float* part_sum = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  int keys[kMaxAttentionRows] = {};  // of the segment that the row sees
};

PYENGINE_INLINE int64_t round_to_16(int64_t n) { return (n + 15) / 16 * 16; }

static int padded_rows(int num_rows, int group) {
  return num_rows == 1 ? 1 : (num_rows + group - 1) / group * group;
}

static int64_t state_floats(const AttentionJob& j, int units) {
  const int64_t query = round_to_16(j.kv.head_dim + 1);
  return units * (query + ops::kKeySegment + 2 * j.kv.head_dim_v) + 4 * round_to_16(units);
}

// Lays the state out in `scratch` (state_floats() of it) and starts it.
static void start(AttentionState& s, int rows, float* scratch) {
  const AttentionJob& j = s.job;
  s.rows = rows;
  s.units = rows * s.item.num_heads;
  s.query_stride = round_to_16(j.kv.head_dim + 1);
  auto take = [&scratch](int64_t n) {
    float* p = scratch;
    scratch += n;
    return p;
  };
  s.query = take(s.units * s.query_stride);
  s.scores = take(int64_t{s.units} * ops::kKeySegment);
  s.part_out = take(s.units * j.kv.head_dim_v);
  s.out = take(s.units * j.kv.head_dim_v);
  s.part_max = take(round_to_16(s.units));
  s.part_sum = take(round_to_16(s.units));
  s.max = take(round_to_16(s.units));
  s.sum = take(round_to_16(s.units));
  for (int u = 0; u < s.units; ++u) {
    s.max[u] = -__builtin_inff();
    s.sum[u] = 0.0f;
  }
  for (int64_t i = 0; i < s.units * j.kv.head_dim_v; i += kLanes) store(s.out + i, zero());
}

static void scale_queries(AttentionState& s) {
  const AttentionJob& j = s.job;
  const Vf scale = set1(j.scale);
  for (int u = 0; u < s.units; ++u) {
    const int row = u % s.rows < s.item.num_rows ? u % s.rows : s.item.num_rows - 1;
    const float* q =
        j.q + (s.item.row0 + row) * j.channels + (s.item.head0 + u / s.rows) * j.kv.head_dim;
    float* to = s.query + u * s.query_stride;
    for (int64_t d = 0; d < s.query_stride; d += kLanes) {
      const int64_t left = j.kv.head_dim - d;
      store(to + d, left > 0 ? mul(load_upto(q + d, left), scale) : zero());
    }
  }
}

static int position(const AttentionState& s, int row) {
  const int last = s.item.num_rows - 1;
  return s.job.positions[s.item.row0 + (row < last ? row : last)];
}

// Sets the keys that each row sees of a segment; returns the most of them.
static int count_keys(AttentionState& s, int segment) {
  for (int r = 0; r < s.rows; ++r) {
    const int seen = position(s, r) + 1 - segment * ops::kKeySegment;
    s.keys[r] = seen < 0 ? 0 : seen > ops::kKeySegment ? ops::kKeySegment : seen;
  }
  return s.keys[s.rows - 1];
}

// Scores to probabilities. Lanes after a row's last key hold -infinity, vectors after it anything.
static void softmax(AttentionState& s) {
  for (int u = 0; u < s.units; ++u) {
    const int keys = s.keys[u % s.rows];
    if (keys == 0) continue;
    float* p = s.scores + int64_t{u} * ops::kKeySegment;
    Vf best = load(p);
    for (int i = kLanes; i < keys; i += kLanes) best = max(best, load(p + i));
    const float highest = max_of(best);
    Vf total = zero();
    for (int i = 0; i < keys; i += kLanes) {
      const Vf e = exp2_nonpositive(sub(load(p + i), set1(highest)));
      store(p + i, e);
      total = add(total, e);
    }
    s.part_max[u] = highest;
    s.part_sum[u] = cpu::PYENGINE_ISA::sum(total);
  }
}

// One unit's segment into its sums.
static void merge_part(const AttentionState& s, int unit, float part_max, float part_sum,
                       const float* part_out) {
  const float highest = part_max > s.max[unit] ? part_max : s.max[unit];
  const Vf a = exp2_nonpositive(set1(s.max[unit] - highest));
  const Vf b = exp2_nonpositive(set1(part_max - highest));
  s.max[unit] = highest;
  store(s.sum + unit, fma(set1(s.sum[unit]), a, mul(set1(part_sum), b)), 1);
  float* o = s.out + unit * s.job.kv.head_dim_v;
  for (int64_t d = 0; d < s.job.kv.head_dim_v; d += kLanes) {
    store(o + d, fma(load(o + d), a, mul(load(part_out + d), b)));
  }
}

// A part: whether the row sees any of the segment, its maximum and sum, and from 16 on the values.
static int64_t part_floats(const AttentionJob& j) { return 16 + j.kv.head_dim_v; }

static void store_parts(const AttentionState& s, float* partials) {
  for (int u = 0; u < s.units; ++u) {
    if (u % s.rows >= s.item.num_rows) continue;
    float* to = partials + (u / s.rows * s.item.num_rows + u % s.rows) * part_floats(s.job);
    to[0] = s.keys[u % s.rows] == 0 ? 0.0f : 1.0f;
    to[1] = s.part_max[u];
    to[2] = s.part_sum[u];
    const float* o = s.part_out + u * s.job.kv.head_dim_v;
    for (int64_t d = 0; d < s.job.kv.head_dim_v; d += kLanes) store(to + 16 + d, load(o + d));
  }
}

// O / L of every row to the output.
static void finish(const AttentionState& s) {
  const AttentionJob& j = s.job;
  for (int u = 0; u < s.units; ++u) {
    const int row = u % s.rows;
    if (row >= s.item.num_rows) continue;
    const int64_t at =
        (s.item.row0 + row) * j.channels + (s.item.head0 + u / s.rows) * j.kv.head_dim;
    const Vf total = set1(s.sum[u]);
    const float* from = s.out + u * j.kv.head_dim_v;
    for (int64_t d = 0; d < j.kv.head_dim; d += kLanes) {
      const Vf o = div(load(from + d), total);
      if (j.out_bf16) {
        store_bf16_upto(static_cast<uint16_t*>(j.out) + at + d, o, j.kv.head_dim - d);
      } else {
        store_upto(static_cast<float*>(j.out) + at + d, o, j.kv.head_dim - d);
      }
    }
  }
}

static void merge_attention(const AttentionJob& j, const AttentionItem& item, const float* partials,
                            int64_t stride, int num_segments, float* scratch) {
  AttentionState s{j, item};
  start(s, item.num_rows, scratch);
  for (int segment = 0; segment < num_segments; ++segment) {
    for (int u = 0; u < s.units; ++u) {
      const float* part = partials + segment * stride + u * part_floats(j);
      if (part[0] != 0.0f) merge_part(s, u, part[1], part[2], part + 16);
    }
  }
  finish(s);
}

// ---- Walking through the cache ----------------------------------------------------------------

// The blocks of one piece of a segment: `tokens` keys of one head, or the values.
template <int kPieceBlocks>
struct Piece {
  const char* block[kPieceBlocks];
};

// Pieces in the order of their use: for each piece of the segment's keys every head, then the same
// of its values. So memory is read in long runs: the heads of a block are neighbours.
template <int kPieceBlocks>
class Pieces {
 public:
  static constexpr int kTokens = kPieceBlocks * 16;

  Pieces(const AttentionState& s, int segment, int num_keys)
      : s_(s), segment_(segment), per_head_((num_keys + kTokens - 1) / kTokens) {}

  int count() const { return per_head_ * s_.item.num_heads; }  // of keys, and again of values
  int head(int i) const { return i % s_.item.num_heads; }      // less head0
  int first_key(int i) const { return i / s_.item.num_heads * kTokens; }  // in the segment

  // Piece i of count() of keys, and then as many of values.
  Piece<kPieceBlocks> at(int i) const {
    const KVMemory& kv = s_.job.kv;
    const bool values = i >= count();
    if (values) i -= count();
    const int64_t head_at = values ? kv.values_at + (s_.item.head0 + head(i)) * kv.value_bytes
                                   : (s_.item.head0 + head(i)) * kv.key_bytes;
    const int first = (segment_ * ops::kKeySegment + first_key(i)) / 16;
    const int last = position(s_, s_.rows - 1) / 16;
    Piece<kPieceBlocks> piece;
    for (int b = 0; b < kPieceBlocks; ++b) {
      // A block without keys need not exist: the first one's scores stand in and are replaced.
      const int logical = first + b <= last ? first + b : first;
      piece.block[b] = kv.data + s_.item.block_table[logical] * kv.block_bytes + head_at;
    }
    return piece;
  }

  // What follows piece i, to be fetched into the cache meanwhile.
  Piece<kPieceBlocks> after(int i) const {
    if (i + 1 < 2 * count()) return at(i + 1);
    const int next = (segment_ + 1) * ops::kKeySegment;
    if (s_.item.segment >= 0 || next > position(s_, s_.rows - 1)) return at(i);
    return Pieces(s_, segment_ + 1, kTokens).at(0);
  }

 private:
  const AttentionState& s_;
  int segment_;
  int per_head_;
};

// Every piece of keys to `score`, the softmax, and every piece of values to `add`; each takes
// (head, first key in the segment, piece, the piece that follows).
template <int kPieceBlocks, class Score, class Softmax, class Add>
static void walk_segment(const AttentionState& s, int segment, int num_keys, Score score,
                         Softmax weigh, Add add_values) {
  const Pieces<kPieceBlocks> pieces(s, segment, num_keys);
  const int n = pieces.count();
  for (int i = 0; i < n; ++i)
    score(pieces.head(i), pieces.first_key(i), pieces.at(i), pieces.after(i));
  weigh();
  for (int i = 0; i < n; ++i) {
    add_values(pieces.head(i), pieces.first_key(i), pieces.at(n + i), pieces.after(n + i));
  }
}

// All segments of an item: `walk(segment, num_keys)` leaves part_max, part_sum and part_out.
template <class Walk>
static void for_each_segment(AttentionState& s, Walk walk) {
  if (s.item.segment >= 0) {
    walk(s.item.segment, count_keys(s, s.item.segment));
    return store_parts(s, s.item.partials);
  }
  const int last = position(s, s.rows - 1);
  for (int segment = 0; segment * ops::kKeySegment <= last; ++segment) {
    walk(segment, count_keys(s, segment));
    for (int u = 0; u < s.units; ++u) {
      if (s.keys[u % s.rows] == 0) continue;
      merge_part(s, u, s.part_max[u], s.part_sum[u], s.part_out + u * s.job.kv.head_dim_v);
    }
  }
  finish(s);
}

// ---- The products, in FMAs --------------------------------------------------------------------

constexpr int kFmaBlocks = 4;  // blocks of a piece: 64 keys, 16 KB of f32 keys of 64 channels
using FmaPiece = Piece<kFmaBlocks>;

// How each dtype is read. A step of keys is a channel, or a pair of them; a step of values is a
// token, or a pair. fma_steps adds step `i` of vectors v to the accumulators of `kRows` rows, which
// multiply it by x[r * stride + i * kPerStep].
struct ReadF32 {
  static constexpr int kPerStep = 1;
  static constexpr int kBytes = 4;  // of one lane of a step
  static constexpr int64_t kScales = 0;
  using Word = Vf;
  PYENGINE_INLINE Word read(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  template <int kPart>
  PYENGINE_INLINE Vf part(Word w) {
    return w;
  }
};

struct ReadBf16 {
  static constexpr int kPerStep = 2;
  static constexpr int kBytes = 4;
  static constexpr int64_t kScales = 0;
  using Word = Vi;
  PYENGINE_INLINE Word read(const char* p) {
    return load_halves(reinterpret_cast<const uint16_t*>(p));
  }
  template <int kPart>
  PYENGINE_INLINE Vf part(Word w) {
    return kPart == 0 ? low_half(w) : high_half(w);
  }
};

struct ReadI8 {
  static constexpr int kPerStep = 1;
  static constexpr int kBytes = 1;
  static constexpr int64_t kScales = 64;  // bytes of scales before the first step
  using Word = Vf;
  PYENGINE_INLINE Word read(const char* p) { return load_i8(reinterpret_cast<const int8_t*>(p)); }
  template <int kPart>
  PYENGINE_INLINE Vf part(Word w) {
    return w;
  }
};

// acc[r][v] += x[r][0..kPerStep) times the parts of the words at p[v] + offset.
template <class Read, bool kAhead, int kRows, int kVectors>
PYENGINE_INLINE void multiply_step(Vf (&acc)[kRows][kVectors], const float* x, int64_t ldx,
                                   const char* const* p, const char* const* ahead, int64_t offset) {
  typename Read::Word word[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    word[v] = Read::read(p[v] + offset);
    // One line holds 16 / kLanes vectors, and of i8 four times as many.
    if (kAhead) __builtin_prefetch(ahead[v] + offset, 0, 3);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vf first = set1(x[r * ldx]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = fma(first, Read::template part<0>(word[v]), acc[r][v]);
    }
    if constexpr (Read::kPerStep == 2) {
      const Vf second = set1(x[r * ldx + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = fma(second, Read::template part<1>(word[v]), acc[r][v]);
      }
    }
  }
}

// Scores of kVectors vectors of keys, from key `key` of the piece on. keys[r]: how many of the
// piece's keys row r sees.
template <class Read, int kRows, int kVectors, bool kAhead>
static void score_vectors(const AttentionState& s, const FmaPiece& piece, const FmaPiece& ahead,
                          int key, const float* query, const int* keys, float* scores) {
  Vf acc[kRows][kVectors];
  const char* p[kVectors];
  const char* next[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = key + v * kLanes;
    p[v] = piece.block[at / 16] + Read::kScales + at % 16 * Read::kBytes;
    next[v] = ahead.block[at / 16] + at % 16 * Read::kBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  }
  const int64_t steps = (s.job.kv.head_dim + Read::kPerStep - 1) / Read::kPerStep;
  for (int64_t i = 0; i < steps; ++i) {
    multiply_step<Read, kAhead>(acc, query + i * Read::kPerStep, s.query_stride, p, next,
                                i * 16 * Read::kBytes);
  }
  const Vf minus_infinity = set1(-__builtin_inff());
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = key + v * kLanes;
      Vf score = acc[r][v];
      if constexpr (Read::kScales != 0) {
        score = mul(score, load(reinterpret_cast<const float*>(piece.block[at / 16]) + at % 16));
      }
      store(scores + r * ops::kKeySegment + at, keep_first(score, keys[r] - at, minus_infinity));
    }
  }
}

// Channels [d, d + kVectors kLanes) of the values. p[r][i] weighs token i of the piece; the first
// `common` tokens are seen by all rows, row r sees keys[r].
template <class Read, int kRows, int kVectors, bool kAhead>
static void add_vectors(const AttentionState& s, const FmaPiece& piece, const FmaPiece& ahead,
                        int64_t d, const float* p, const int* keys, int common, bool first,
                        float* out) {
  const int64_t ldo = s.job.kv.head_dim_v, step_bytes = ldo * Read::kBytes;
  Vf acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = first ? zero() : load(out + r * ldo + d + v * kLanes);
    }
  }
  constexpr int kSteps = 16 / Read::kPerStep;  // of a block
  const int whole = common / Read::kPerStep;
  for (int step0 = 0; step0 < whole; step0 += kSteps) {
    const char* at[kVectors];
    const char* next[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = (d + v * kLanes) * Read::kBytes;
      at[v] = piece.block[step0 / kSteps] + Read::kScales + offset;
      next[v] = ahead.block[step0 / kSteps] + offset;
    }
    const int count = whole - step0 < kSteps ? whole - step0 : kSteps;
    for (int i = 0; i < count; ++i) {
      multiply_step<Read, kAhead>(acc, p + (step0 + i) * Read::kPerStep, ops::kKeySegment, at, next,
                                  i * step_bytes);
    }
  }
  // The diagonal: not all rows see these.
  int most = 0;
  for (int r = 0; r < kRows; ++r) most = keys[r] > most ? keys[r] : most;
  for (int key = whole * Read::kPerStep; key < most; ++key) {
    const char* at = piece.block[key / 16] + Read::kScales + key % 16 / Read::kPerStep * step_bytes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto word = Read::read(at + (d + v * kLanes) * Read::kBytes);
      const Vf value =
          key % Read::kPerStep == 0 ? Read::template part<0>(word) : Read::template part<1>(word);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (key < keys[r]) acc[r][v] = fma(set1(p[r * ops::kKeySegment + key]), value, acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * ldo + d + v * kLanes, acc[r][v]);
  }
}

template <class Read, int kRows>
class FmaAttention {
 public:
  explicit FmaAttention(AttentionState& s) : s_(s) {}

  void run() {
    for_each_segment(s_, [this](int segment, int num_keys) {
      walk_segment<kFmaBlocks>(
          s_, segment, num_keys,
          [this](int head, int first, const FmaPiece& piece, const FmaPiece& ahead) {
            score(head, first, piece, ahead);
          },
          [this] { softmax(s_); },
          [this](int head, int first, const FmaPiece& piece, const FmaPiece& ahead) {
            add_values(head, first, piece, ahead);
          });
    });
  }

 private:
  static constexpr int kTokens = kFmaBlocks * 16;

  // keys[r] of the piece that starts at key `first` of the segment; returns the most.
  int keys_of_group(int row0, int first, int* keys) const {
    int most = 0;
    for (int r = 0; r < kRows; ++r) {
      const int seen = s_.keys[row0 + r] - first;
      keys[r] = seen < 0 ? 0 : seen > kTokens ? kTokens : seen;
      most = keys[r] > most ? keys[r] : most;
    }
    return most;
  }

  void score(int head, int first, const FmaPiece& piece, const FmaPiece& ahead) {
    bool fetch = true;
    for (int row0 = 0; row0 < s_.rows; row0 += kRows) {
      int keys[kRows];
      const int most = keys_of_group(row0, first, keys);
      if (most == 0) continue;
      const int64_t unit = head * s_.rows + row0;
      const float* query = s_.query + unit * s_.query_stride;
      float* scores = s_.scores + unit * ops::kKeySegment + first;
      int key = 0;
      for (; most - key > (kScoreVectors - 1) * kLanes; key += kScoreVectors * kLanes) {
        if (fetch) {
          score_vectors<Read, kRows, kScoreVectors, true>(s_, piece, ahead, key, query, keys,
                                                          scores);
        } else {
          score_vectors<Read, kRows, kScoreVectors, false>(s_, piece, ahead, key, query, keys,
                                                           scores);
        }
      }
      for (; key < most; key += kLanes) {
        score_vectors<Read, kRows, 1, false>(s_, piece, ahead, key, query, keys, scores);
      }
      fetch = false;
    }
  }

  void add_values(int head, int first, const FmaPiece& piece, const FmaPiece& ahead) {
    bool fetch = true;
    for (int row0 = 0; row0 < s_.rows; row0 += kRows) {
      int keys[kRows];
      const int most = keys_of_group(row0, first, keys);
      if (most == 0) continue;
      int common = kTokens;
      for (int r = 0; r < kRows; ++r) common = keys[r] < common ? keys[r] : common;
      const int64_t unit = head * s_.rows + row0, padded = s_.job.kv.head_dim_v;
      float* p = s_.scores + unit * ops::kKeySegment + first;
      float* out = s_.part_out + unit * padded;
      if constexpr (Read::kScales != 0) scale_probabilities(piece, most, p);
      int64_t d = 0;
      for (; padded - d >= kValueVectors * kLanes; d += kValueVectors * kLanes) {
        if (fetch) {
          add_vectors<Read, kRows, kValueVectors, true>(s_, piece, ahead, d, p, keys, common,
                                                        first == 0, out);
        } else {
          add_vectors<Read, kRows, kValueVectors, false>(s_, piece, ahead, d, p, keys, common,
                                                         first == 0, out);
        }
      }
      for (; d < padded; d += kLanes) {
        add_vectors<Read, kRows, 1, false>(s_, piece, ahead, d, p, keys, common, first == 0, out);
      }
      fetch = false;
    }
  }

  // p times the scales of the values, so that the chain runs over integers.
  static void scale_probabilities(const FmaPiece& piece, int most, float* p) {
    for (int key = 0; key < most; key += kLanes) {
      const Vf scale = load(reinterpret_cast<const float*>(piece.block[key / 16]) + key % 16);
      for (int r = 0; r < kRows; ++r) {
        float* at = p + r * ops::kKeySegment + key;
        store(at, mul(load(at), scale));
      }
    }
  }

  AttentionState& s_;
};

template <class Read>
static void run_fma_attention(const AttentionJob& j, const AttentionItem& item, float* scratch) {
  AttentionState s{j, item};
  start(s, padded_rows(item.num_rows, kAttentionRows), scratch);
  scale_queries(s);
  if (item.num_rows == 1) {
    FmaAttention<Read, 1>(s).run();
  } else {
    FmaAttention<Read, kAttentionRows>(s).run();
  }
}

static int64_t fma_attention_floats(const AttentionJob& j, int num_rows, int num_heads) {
  return state_floats(j, padded_rows(num_rows, kAttentionRows) * num_heads);
}

// Groups of an item: while they take turns, keys and values stay in the first-level cache.
constexpr int kAttentionGroups = 4;
static_assert(kAttentionRows * kAttentionGroups <= kMaxAttentionRows, "");

template <class Read>
constexpr AttentionKernels fma_attention_kernels() {
  return {kAttentionRows * kAttentionGroups, kAttentionRows, fma_attention_floats,
          run_fma_attention<Read>,           part_floats,    merge_attention};
}

constexpr AttentionKernels kAttentionF32 = fma_attention_kernels<ReadF32>();
constexpr AttentionKernels kAttentionBf16 = fma_attention_kernels<ReadBf16>();
constexpr AttentionKernels kAttentionI8 = fma_attention_kernels<ReadI8>();

// ---- Writing an i8 cache ----------------------------------------------------------------------

// n elements to bytes `stride` apart, their scale to *scale: max |x| / 127, NaN if one is not a
// number or infinite.
static void quantize_head(const float* x, int64_t n, int8_t* out, int64_t stride, float* scale) {
  Vf largest = zero(), nan = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf v = load_upto(x + i, n - i);
    largest = max(largest, abs(v));
    nan = fma(v, zero(), nan);  // infinity times zero is NaN too
  }
  const float peak = max_of(largest);
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  *scale = peak * (1.0f / 127.0f) + cpu::PYENGINE_ISA::sum(nan);
  const Vf shift = set1(12582912.0f);  // 1.5 * 2^23: the low byte of the sum is the integer
  for (int64_t i = 0; i < n; i += kLanes) {
    float rounded[kLanes];
    store(rounded, add(mul(load_upto(x + i, n - i), set1(inverse)), shift));
    const int64_t lanes = smaller(n - i, kLanes);
    for (int64_t l = 0; l < lanes; ++l) {
      __builtin_memcpy(out + (i + l) * stride, rounded + l, 1);  // little-endian
    }
  }
}

static void quantize_kv(const KVMemory& kv, int64_t slot, const float* keys, const float* values) {
  char* block = kv.data + slot / 16 * kv.block_bytes;
  slot %= 16;
  for (int64_t head = 0; head < kv.n_head; ++head) {
    char* key = block + head * kv.key_bytes;
    char* value = block + kv.values_at + head * kv.value_bytes;
    quantize_head(keys + head * kv.head_dim, kv.head_dim,
                  reinterpret_cast<int8_t*>(key) + ReadI8::kScales + slot, 16,
                  reinterpret_cast<float*>(key) + slot);
    quantize_head(values + head * kv.head_dim, kv.head_dim,
                  reinterpret_cast<int8_t*>(value) + ReadI8::kScales + slot * kv.head_dim_v, 1,
                  reinterpret_cast<float*>(value) + slot);
  }
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The two products of attention in FMAs, for f32 and bf16 caches.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kFmaBlocks = 4;  // blocks of a piece: 64 keys, 16 KB of f32 keys of 64 channels
using FmaPiece = Piece<kFmaBlocks>;

static void scale_queries(AttentionState& s) {
  const AttentionJob& j = s.job;
  const Vf scale = set1(j.scale);
  for (int u = 0; u < s.units; ++u) {
    const float* q = query_of(s, u);
    float* to = s.query + u * s.query_stride;
    for (int64_t d = 0; d < s.query_stride; d += kLanes) {
      const int64_t left = j.kv.head_dim - d;
      store(to + d, left > 0 ? mul(load_upto(q + d, left), scale) : zero());
    }
  }
}

// Scores to probabilities. Lanes after a row's last key hold -infinity, vectors after it anything.
static void softmax(AttentionState& s) {
  for (int u = 0; u < s.units; ++u) {
    const int keys = s.keys[u % s.rows];
    if (keys == 0) continue;
    fetch_next_query(s, u);
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

// How each dtype is read. A step of keys is a channel, or a pair of them; a step of values is a
// token, or a pair. fma_steps adds step `i` of vectors v to the accumulators of `kRows` rows, which
// multiply it by x[r * stride + i * kPerStep].
struct ReadF32 {
  static constexpr int kPerStep = 1;
  static constexpr int kBytes = 4;  // of one lane of a step
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
  using Word = Vi;
  PYENGINE_INLINE Word read(const char* p) {
    return load_halves(reinterpret_cast<const uint16_t*>(p));
  }
  template <int kPart>
  PYENGINE_INLINE Vf part(Word w) {
    return kPart == 0 ? low_half(w) : high_half(w);
  }
};

// Vectors of one row in work at once: with as many sums as several rows have, no step waits for the
// one before.
template <int kRows, int kVectors>
constexpr int vectors_of = kRows == 1 ? kSingleVectors : kVectors;

// acc[r][v] += x[r][0..kPerStep) times the parts of the words at p[v] + offset.
template <class Read, bool kAhead, int kRows, int kVectors>
PYENGINE_INLINE void multiply_step(Vf (&acc)[kRows][kVectors], const float* x, int64_t ldx,
                                   const char* const* p, const char* const* ahead, int64_t offset) {
  typename Read::Word word[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    word[v] = Read::read(p[v] + offset);
    if (kAhead && v * kLanes % 16 == 0) __builtin_prefetch(ahead[v] + offset, 0, 2);  // a line
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vf first = set1(x[r * ldx]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = fma(first, Read::template part<0>(word[v]), acc[r][v]);
    }
    if constexpr (Read::kPerStep == 2) {
      const Vf second = set1(x[r * ldx + 1]);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int at = key + v * kLanes;
    p[v] = piece.block[at / 16] + at % 16 * Read::kBytes;
    next[v] = ahead.block[at / 16] + at % 16 * Read::kBytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = key + v * kLanes;
      store(scores + r * ops::kKeySegment + at,
            keep_first(acc[r][v], keys[r] - at, minus_infinity));
    }
  }
}

// What a group of rows adds of a piece of values: p[r][i] weighs token i; the first `common` tokens
// are seen by all rows, row r sees keys[r].
struct ValueGroup {
  const float* p;
  const int* keys;
  int common;
  bool first;  // piece of the segment
  float* out;
};

// Channels [d, d + kVectors kLanes) of the values.
template <class Read, int kRows, int kVectors, bool kAhead>
static void add_vectors(const AttentionState& s, const FmaPiece& piece, const FmaPiece& ahead,
                        int64_t d, const ValueGroup& group) {
  const float* p = group.p;
  const int* keys = group.keys;
  float* out = group.out;
  const int64_t ldo = s.job.kv.head_dim_v, step_bytes = ldo * Read::kBytes;
  Vf acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = group.first ? zero() : load(out + r * ldo + d + v * kLanes);
    }
  }
  constexpr int kSteps = 16 / Read::kPerStep;  // of a block
  const int whole = group.common / Read::kPerStep;
  for (int step0 = 0; step0 < whole; step0 += kSteps) {
    const char* at[kVectors];
    const char* next[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = (d + v * kLanes) * Read::kBytes;
      at[v] = piece.block[step0 / kSteps] + offset;
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
    const char* at = piece.block[key / 16] + key % 16 / Read::kPerStep * step_bytes;
#pragma GCC unroll 8
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
#pragma GCC unroll 8
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
      score_keys<vectors_of<kRows, kScoreVectors>>(0, most, fetch, piece, ahead, query, keys,
                                                   scores);
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
      const float* p = s_.scores + unit * ops::kKeySegment + first;
      float* out = s_.part_out + unit * padded;
      const ValueGroup group = {p, keys, common, first == 0, out};
      add_channels<vectors_of<kRows, kValueVectors>>(0, padded, fetch, piece, ahead, group);
      fetch = false;
    }
  }

  // Keys [key, most) of the piece, kVectors vectors at a time, and what is left in halves of them.
  template <int kVectors>
  void score_keys(int key, int most, bool fetch, const FmaPiece& piece, const FmaPiece& ahead,
                  const float* query, const int* keys, float* scores) {
    for (; most - key > (kVectors - 1) * kLanes; key += kVectors * kLanes) {
      if (fetch) {
        score_vectors<Read, kRows, kVectors, true>(s_, piece, ahead, key, query, keys, scores);
      } else {
        score_vectors<Read, kRows, kVectors, false>(s_, piece, ahead, key, query, keys, scores);
      }
    }
    if constexpr (kVectors > 1) {
      score_keys<kVectors / 2>(key, most, fetch, piece, ahead, query, keys, scores);
    }
  }

  // The same for channels [d, padded) of the values.
  template <int kVectors>
  void add_channels(int64_t d, int64_t padded, bool fetch, const FmaPiece& piece,
                    const FmaPiece& ahead, const ValueGroup& group) {
    for (; padded - d >= kVectors * kLanes; d += kVectors * kLanes) {
      if (fetch) {
        add_vectors<Read, kRows, kVectors, true>(s_, piece, ahead, d, group);
      } else {
        add_vectors<Read, kRows, kVectors, false>(s_, piece, ahead, d, group);
      }
    }
    if constexpr (kVectors > 1) {
      add_channels<kVectors / 2>(d, padded, fetch, piece, ahead, group);
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

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

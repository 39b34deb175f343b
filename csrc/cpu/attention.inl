// Attention of some query rows of one sequence, over the paged cache, for some of its heads.
//
// Keys are taken in segments of 256 (16 blocks, aligned to position 0). Each has a softmax of its
// own, in powers of two (the scale holds log2 e):
//   s = (scale q) . k, a chain over channels, lanes are keys
//   m = max s;  p = 2^(s - m);  l = sum p;  o = chain over the segment's keys of p v, from zero,
//   lanes are channels
// and segments are merged in order, into M, L, O = m, l, o of the first:
//   M' = max(M, m);  a = 2^(M - M');  b = 2^(m - M');  L = L a + l b;  O = O a + o b
// At the end O (1 / L). A row takes exactly the keys up to its own position: scores of later keys
// are replaced, never computed with (unwritten cache may hold anything), and its chain over values
// ends with its last key. So its result depends neither on the rows beside it nor on who computes
// which segment.
//
// This file holds the frame; the two products are in attention_fma.inl and attention_amx.inl.

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

PYENGINE_INLINE void exchange(float*& a, float*& b) {
  float* const c = a;
  a = b;
  b = c;
}

PYENGINE_INLINE int64_t round_to_16(int64_t n) { return (n + 15) / 16 * 16; }

static int padded_rows(int num_rows, int group) {
  return num_rows == 1 ? 1 : (num_rows + group - 1) / group * group;
}

static int64_t state_floats(const AttentionJob& j, int units) {
  const int64_t query = round_to_16(j.kv.head_dim + 1);
  return units * (query + ops::kKeySegment + 2 * j.kv.head_dim_v) + 4 * round_to_16(units);
}

// Lays the state out in `scratch`, state_floats() of it.
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
}

static const float* query_of(const AttentionState& s, int unit) {
  const int row = unit % s.rows, last = s.item.num_rows - 1;
  return s.job.q + (s.item.row0 + (row < last ? row : last)) * s.job.channels +
         (s.item.head0 + unit / s.rows) * s.job.kv.head_dim;
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

// Asks for the query that the next item has where this one has `unit`: they lie rows apart, which
// no prefetcher of the processor foresees.
static void fetch_next_query(const AttentionState& s, int unit) {
  const AttentionItem* next = s.item.next;
  const int row = unit % s.rows, head = unit / s.rows;
  if (next == nullptr || row >= next->num_rows || head >= next->num_heads) return;
  const auto* q = reinterpret_cast<const char*>(s.job.q + (next->row0 + row) * s.job.channels +
                                                (next->head0 + head) * s.job.kv.head_dim);
  for (int64_t i = 0; i < s.job.kv.head_dim * 4; i += 64) __builtin_prefetch(q + i, 0, 3);
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
    const Vf inverse = set1(1.0f / s.sum[u]);
    const float* from = s.out + u * j.kv.head_dim_v;
    for (int64_t d = 0; d < j.kv.head_dim; d += kLanes) {
      const Vf o = mul(load(from + d), inverse);
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
      if (segment == 0) {
        s.max[u] = part[1];
        s.sum[u] = part[2];
        __builtin_memcpy(s.out + u * j.kv.head_dim_v, part + 16,
                         static_cast<size_t>(j.kv.head_dim_v) * 4);
      } else if (part[0] != 0.0f) {
        merge_part(s, u, part[1], part[2], part + 16);
      }
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
    if (s_.item.segment < 0 && next <= position(s_, s_.rows - 1)) {
      return Pieces(s_, segment_ + 1, kTokens).at(0);
    }
    return s_.item.next != nullptr ? first_piece(*s_.item.next) : at(i);
  }

 private:
  Piece<kPieceBlocks> first_piece(const AttentionItem& item) const {
    const KVMemory& kv = s_.job.kv;
    const int last = s_.job.positions[item.row0 + item.num_rows - 1] / 16;
    Piece<kPieceBlocks> piece;
    for (int b = 0; b < kPieceBlocks; ++b) {
      const int64_t block = item.block_table[b <= last ? b : 0];
      piece.block[b] = kv.data + block * kv.block_bytes + item.head0 * kv.key_bytes;
    }
    return piece;
  }

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
  walk(0, count_keys(s, 0));  // every row sees some of it
  exchange(s.part_max, s.max);
  exchange(s.part_sum, s.sum);
  exchange(s.part_out, s.out);
  const int last = position(s, s.rows - 1);
  for (int segment = 1; segment * ops::kKeySegment <= last; ++segment) {
    walk(segment, count_keys(s, segment));
    for (int u = 0; u < s.units; ++u) {
      if (s.keys[u % s.rows] == 0) continue;
      merge_part(s, u, s.part_max[u], s.part_sum[u], s.part_out + u * s.job.kv.head_dim_v);
    }
  }
  finish(s);
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The two products of attention in AMX tiles, for bf16 caches; the frame is attention.inl.
//
// Queries are rounded to bf16 after scaling. A tile of 16 keys times 32 channels is one load from a
// bf16 block. Probabilities are rounded to bf16 too, and their sum is that of the rounded ones, so
// that they weigh to one; a tile of values is 16 tokens of 16 channels. The order of a sum:
//   q k   for each 32 channels (the last may be fewer), rising: one tdpbf16ps
//   p v   for each block of 16 tokens, rising: one tdpbf16ps
//
// A tile multiplies everything it holds, and 0 times infinity is not 0: of a block that not all
// rows of a group see whole, a copy is taken in which the tokens after the last row's are zero. If
// what remains is not finite, each row gets a copy of its own.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kAmxRows = 16;  // of a tile
constexpr int kAmxBlocks = ops::kKeySegment / 16;
constexpr int kAmxMaxRows = 2 * kAmxRows;  // of an item: each loaded tile serves two groups
constexpr int kAmxShared = 4;
using AmxPiece = Piece<kAmxBlocks>;

static_assert(kAmxMaxRows <= kMaxAttentionRows, "");

// Tiles 0 to 3 hold sums, [rows][16] f32. 4 and 6 are 32 channels of queries and of keys; 5 and 7
// the last channels, fewer than 32, or probabilities and values of 16 tokens.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int group_rows, int pairs) {
    for (int t = 0; t < 8; ++t) {
      row_bytes[t] = static_cast<uint16_t>(t == 5 ? pairs * 4 : 64);
      rows[t] = static_cast<uint8_t>(t == 6 ? 16 : t == 7 ? pairs : group_rows);
    }
  }
};

constexpr int kTokenPairs = 8;  // of a block

// 2^x for x <= 0, relative error below 1e-4, which is a fortieth of what rounding to bf16 adds; 0
// for -infinity, NaN for NaN.
PYENGINE_INLINE Vf exp2_rough(Vf x) {
  const Vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vf p = set1(7.8024520e-2f);                               // minimax on [0, 1]
  p = fma(p, r, set1(2.2606718e-1f));
  p = fma(p, r, set1(6.9583352e-1f));
  p = fma(p, r, set1(9.9992522e-1f));
  return _mm512_scalef_ps(p, x);  // p 2^floor(x)
}

PYENGINE_INLINE __m256i round_to_bf16(Vf a) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
}

class AmxAttention {
 public:
  AmxAttention(AttentionState& s, float* scratch)
      : s_(s),
        group_rows_(s.rows < kAmxRows ? s.rows : kAmxRows),
        pairs_((s.job.kv.head_dim + 1) / 2),
        tail_pairs_(static_cast<int>(pairs_ % 16)),
        query_stride_((pairs_ + 15) / 16 * 32) {
    char* bytes = reinterpret_cast<char*>(scratch);
    auto take = [&bytes](int64_t n) {
      char* p = bytes;
      bytes += (n + 63) / 64 * 64;
      return p;
    };
    query_ = reinterpret_cast<uint16_t*>(s.query);
    block_copy_ = reinterpret_cast<uint32_t*>(take(kTokenPairs * kQuad * 4));
    row_out_ = reinterpret_cast<float*>(take(kAmxRows * kQuad * 4));
  }

  static constexpr int64_t scratch_floats() { return (kTokenPairs + kAmxRows) * kQuad; }

  void run() {
    round_queries();
    // With channels in multiples of 32, or 16 over, one configuration serves both products.
    const TileConfig scores(group_rows_, tail_pairs_ == 0 ? kTokenPairs : tail_pairs_);
    const TileConfig values(group_rows_, kTokenPairs);
    const bool one_config = tail_pairs_ == 0 || tail_pairs_ == kTokenPairs;
    _tile_loadconfig(&scores);
    for_each_segment(s_, [&](int segment, int num_keys) {
      walk_segment<kAmxBlocks>(
          s_, segment, num_keys,
          [this](int head, int, const AmxPiece& piece, const AmxPiece& ahead) {
            score(head, piece, fetch_order(piece, ahead));
          },
          [&] {
            if (!one_config) _tile_loadconfig(&values);
          },
          [this](int head, int, const AmxPiece& piece, const AmxPiece& ahead) {
            softmax(head);
            add_values(head, piece, fetch_order(piece, ahead));
          });
      if (!one_config) _tile_loadconfig(&scores);
    });
    _tile_release();
  }

 private:
  static constexpr int64_t kQuad = 64;      // channels of the four tiles of sums
  static constexpr int kFetchDistance = 4;  // blocks: 8 KB of 64 channels in bf16

  // Scaled, rounded, and padded with zeros to whole tiles.
  void round_queries() {
    const Vf scale = set1(s_.job.scale);
    for (int u = 0; u < s_.units; ++u) {
      const float* q = query_of(s_, u);
      for (int64_t d = 0; d < query_stride_; d += 16) {
        const int64_t left = s_.job.kv.head_dim - d;
        const Vf scaled = left > 0 ? mul(load_upto(q + d, left), scale) : zero();
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(query_ + u * query_stride_ + d),
                            round_to_bf16(scaled));
      }
    }
  }

  // What to fetch while block b of a piece is used: the block some places further on, in the piece
  // or the next. A whole piece ahead would drive this one out of the first-level cache.
  AmxPiece fetch_order(const AmxPiece& piece, const AmxPiece& next) const {
    const int blocks = blocks_of_group(s_.rows - group_rows_);
    const int distance = blocks < kFetchDistance ? blocks : kFetchDistance;
    AmxPiece fetch;
    for (int b = 0; b < blocks; ++b) {
      const int at = b + distance;
      fetch.block[b] = at < blocks ? piece.block[at] : next.block[at - blocks];
    }
    return fetch;
  }

  // Blocks of a segment of which a group sees something.
  int blocks_of_group(int row0) const { return (s_.keys[row0 + group_rows_ - 1] + 15) / 16; }

  // ---- q k ----

  void score(int head, const AmxPiece& piece, const AmxPiece& ahead) {
    for (int row0 = 0; row0 < s_.rows; row0 += group_rows_) {
      const int unit = head * s_.rows + row0, group_blocks = blocks_of_group(row0);
      const char* query = reinterpret_cast<const char*>(query_ + unit * query_stride_);
      float* scores = s_.scores + int64_t{unit} * ops::kKeySegment;
      const bool fetch = row0 == 0;
      for (int b = 0; b < group_blocks; b += 4) {
        const int count = group_blocks - b < 4 ? group_blocks - b : 4;
        score_blocks(query, piece.block + b, fetch ? ahead.block + b : nullptr, count,
                     scores + b * 16);
      }
    }
  }

  // Scores of up to four blocks.
  void score_blocks(const char* query, const char* const* keys, const char* const* ahead, int count,
                    float* scores) {
    constexpr int64_t kRowBytes = ops::kKeySegment * 4;
    const int64_t query_bytes = query_stride_ * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t chunks = pairs_ / 16;
    for (int64_t c = 0; c < chunks; ++c) {
      _tile_loadd(4, query + c * 64, query_bytes);
      const int64_t at = c * 1024;
      _tile_loadd(6, keys[0] + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (ahead != nullptr) fetch_lines(ahead[0] + at, 16);
      if (count == 1) continue;
      _tile_loadd(6, keys[1] + at, 64);
      _tile_dpbf16ps(1, 4, 6);
      if (ahead != nullptr) fetch_lines(ahead[1] + at, 16);
      if (count == 2) continue;
      _tile_loadd(6, keys[2] + at, 64);
      _tile_dpbf16ps(2, 4, 6);
      if (ahead != nullptr) fetch_lines(ahead[2] + at, 16);
      if (count == 3) continue;
      _tile_loadd(6, keys[3] + at, 64);
      _tile_dpbf16ps(3, 4, 6);
      if (ahead != nullptr) fetch_lines(ahead[3] + at, 16);
    }
    if (tail_pairs_ != 0) {
      _tile_loadd(5, query + chunks * 64, query_bytes);
      const int64_t at = chunks * 1024;
      if (ahead != nullptr) {
        for (int b = 0; b < count; ++b) fetch_lines(ahead[b] + at, tail_pairs_);
      }
      _tile_loadd(7, keys[0] + at, 64);
      _tile_dpbf16ps(0, 5, 7);
      if (count > 1) {
        _tile_loadd(7, keys[1] + at, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      if (count > 2) {
        _tile_loadd(7, keys[2] + at, 64);
        _tile_dpbf16ps(2, 5, 7);
      }
      if (count > 3) {
        _tile_loadd(7, keys[3] + at, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scores, kRowBytes);
    if (count > 1) _tile_stored(1, scores + 16, kRowBytes);
    if (count > 2) _tile_stored(2, scores + 32, kRowBytes);
    if (count > 3) _tile_stored(3, scores + 48, kRowBytes);
  }

  static void fetch_lines(const char* p, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(p + i * 64, 0, 2);
  }

  // ---- softmax ----

  // Scores of one head to probabilities in bf16, at the beginning of the row that held the scores;
  // zero from a row's last key to the end of what its group sees.
  void softmax(int head) {
    for (int row = 0; row < s_.rows; ++row) {
      const int keys = s_.keys[row], unit = head * s_.rows + row;
      fetch_next_query(s_, unit);
      float* s = s_.scores + int64_t{unit} * ops::kKeySegment;
      auto* p = reinterpret_cast<uint16_t*>(s);
      const int whole = keys / 16 * 16;
      const Vf minus_infinity = set1(-__builtin_inff());
      Vf best = minus_infinity;
      for (int i = 0; i < whole; i += 16) best = max(best, load(s + i));
      if (whole < keys) {
        const Vf score = keep_first(load(s + whole), keys - whole, minus_infinity);
        store(s + whole, score);
        best = max(best, score);
      }
      const float highest = max_of(best);
      Vf total = zero();
      int i = 0;
      for (; i < keys; i += 16) {
        const __m256i rounded = round_to_bf16(exp2_rough(sub(load(s + i), set1(highest))));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), rounded);
        total = add(total, widen(rounded));
      }
      const int group_keys = blocks_of_group(row / group_rows_ * group_rows_) * 16;
      for (; i < group_keys; i += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), _mm256_setzero_si256());
      }
      s_.part_max[unit] = highest;
      s_.part_sum[unit] = cpu::PYENGINE_ISA::sum(total);
    }
  }

  // ---- p v ----

  void add_values(int head, const AmxPiece& piece, const AmxPiece& ahead) {
    const int64_t channels = s_.job.kv.head_dim_v;
    for (int row0 = 0; row0 < s_.rows; row0 += group_rows_) {
      const int most = s_.keys[row0 + group_rows_ - 1];
      if (most == 0) continue;
      const int64_t unit = head * s_.rows + row0;
      float* out = s_.part_out + unit * channels;
      const AmxPiece* fetch = row0 == 0 ? &ahead : nullptr;
      for (int64_t d = 0; d < channels; d += kQuad) {
        const int tiles = static_cast<int>(smaller(kQuad, channels - d) / 16);
        const bool finite = add_quad(row0, unit, piece, fetch, most, d, tiles, out + d, channels);
        if (finite || group_rows_ == 1) continue;
        for (int r = 0; r < group_rows_; ++r) {
          add_quad(row0, unit, piece, nullptr, s_.keys[row0 + r], d, tiles, row_out_, kQuad);
          __builtin_memcpy(out + r * channels + d, row_out_ + r * kQuad,
                           static_cast<size_t>(tiles) * 64);
        }
      }
    }
  }

  // Channels [d, d + 16 tiles) of a group's sums over the first `keys` tokens, to `out`, rows
  // `stride` apart. False if a block that not all rows see whole holds what is not finite.
  bool add_quad(int row0, int64_t unit, const AmxPiece& values, const AmxPiece* ahead, int keys,
                int64_t d, int tiles, float* out, int64_t stride) {
    const int64_t channels = s_.job.kv.head_dim_v;
    const int common = s_.keys[row0] / 16;  // blocks that all rows see whole
    const char* p = reinterpret_cast<const char*>(s_.scores + unit * ops::kKeySegment);
    bool finite = true;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int b = 0; b * 16 < keys; ++b) {
      const char* v = values.block[b] + d * 4;
      int64_t row_bytes = channels * 4;
      if (b >= common) {
        finite &= copy_values(v, row_bytes, tiles, keys - b * 16);
        v = reinterpret_cast<const char*>(block_copy_);
        row_bytes = kQuad * 4;
      }
      _tile_loadd(5, p + b * 32, ops::kKeySegment * 4);
      _tile_loadd(7, v, row_bytes);
      _tile_dpbf16ps(0, 5, 7);
      if (tiles > 1) {
        _tile_loadd(7, v + 64, row_bytes);
        _tile_dpbf16ps(1, 5, 7);
      }
      if (tiles > 2) {
        _tile_loadd(7, v + 128, row_bytes);
        _tile_dpbf16ps(2, 5, 7);
      }
      if (tiles > 3) {
        _tile_loadd(7, v + 192, row_bytes);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (ahead != nullptr) {
        const char* next = ahead->block[b] + d * 4;
        for (int i = 0; i < kTokenPairs; ++i) fetch_lines(next + i * channels * 4, tiles);
      }
    }
    _tile_stored(0, out, stride * 4);
    if (tiles > 1) _tile_stored(1, out + 16, stride * 4);
    if (tiles > 2) _tile_stored(2, out + 32, stride * 4);
    if (tiles > 3) _tile_stored(3, out + 48, stride * 4);
    return finite;
  }

  // The first `tokens` tokens of 16 `tiles` channels to block_copy_, zeros for the others. False if
  // they are not all finite.
  bool copy_values(const char* from, int64_t row_bytes, int tiles, int tokens) {
    const Vi exponent = set1(0x7f807f80);
    __mmask32 special = 0;
    for (int pair = 0; pair < kTokenPairs; ++pair) {
      const int left = tokens - 2 * pair;
      const Vi keep = set1(left >= 2 ? -1 : left == 1 ? 0xffff : 0);
      for (int t = 0; t < tiles; ++t) {
        const Vi word =
            _mm512_and_si512(keep, _mm512_loadu_si512(from + pair * row_bytes + t * 64));
        special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(word, exponent), exponent);
        _mm512_store_si512(block_copy_ + pair * kQuad + t * 16, word);
      }
    }
    return special == 0;
  }

  AttentionState& s_;
  int group_rows_;
  int64_t pairs_;         // of channels
  int tail_pairs_;        // that do not fill a tile
  int64_t query_stride_;  // bf16 elements
  uint16_t* query_;       // [unit][query_stride_]
  uint32_t* block_copy_;  // [8][kQuad]
  float* row_out_;        // [16][kQuad]
};

static int amx_rows(int num_rows) {
  return num_rows <= kAmxRows ? num_rows : padded_rows(num_rows, kAmxRows);
}

static int64_t amx_attention_floats(const AttentionJob& j, int num_rows, int num_heads) {
  const int units = amx_rows(num_rows) * num_heads;
  return round_to_16(state_floats(j, units)) + AmxAttention::scratch_floats();
}

static void run_amx_attention(const AttentionJob& j, const AttentionItem& item, float* scratch) {
  AttentionState s{j, item};
  start(s, amx_rows(item.num_rows), scratch);
  AmxAttention(s, scratch + round_to_16(state_floats(j, s.units))).run();
}

constexpr AttentionKernels kAttentionBf16Amx = {
    kAmxMaxRows, kAmxShared, amx_attention_floats, run_amx_attention, part_floats, merge_attention};

}  // namespace

const AttentionKernels& attention_bf16() { return kAttentionBf16Amx; }

}  // namespace pyengine::cpu::PYENGINE_ISA

// Attention of a few query rows of one sequence and head over the paged cache.
//
// For each tile of 64 keys (4 blocks, aligned to position 0), online softmax:
//   s = scale * (q . k), a chain over channels, lanes are keys
//   m' = max(m, max s);  p = exp(s - m');  c = exp(m - m')
//   l  = l c + sum p
//   o  = o c + (chain over the tile's keys of p v, from zero), lanes are channels
// and at the end o / l. A row takes exactly the keys up to its own position: scores of later keys
// are replaced, never computed with (unwritten cache may hold anything), and its chain over values
// ends with its last key. So its result does not depend on the rows beside it.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kBlockVectors = 16 / kLanes;  // of a KV block's tokens

static_assert(kMaxHeadDim % 16 == 0, "rows of AttentionState::out hold head_dim_v channels");

// What the rows of one item carry from tile to tile. Rows are padded with copies of the last one.
template <int kRows>
struct alignas(64) AttentionState {
  float scores[kRows][ops::kKeyTile];
  float out[kRows][kMaxHeadDim];
  float max[kRows];
  float sum[kRows];
  float correction[kRows];
  const float* query[kRows];
  int keys[kRows];  // of this tile that the row sees
};

// The keys (or values) of one head in the blocks of a tile.
struct TileBlocks {
  const char* at[ops::kKeyTile / 16];
};

template <bool kBf16, int kRows>
static void score_tile(const AttentionJob& j, const TileBlocks& keys, int num_keys,
                       AttentionState<kRows>& state) {
  constexpr int kBlocks = kScoreVectors / kBlockVectors > 0 ? kScoreVectors / kBlockVectors : 1;
  constexpr int kVectors = kScoreVectors;
  constexpr int kPerBlock = kVectors / kBlocks;  // vectors of one block in one pass
  const Vf scale = set1(j.scale), minus_infinity = set1(-__builtin_inff());
  for (int key = 0; key < ops::kKeyTile; key += kVectors * kLanes) {
    if (key >= num_keys) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v)
          store(&state.scores[r][key + v * kLanes], minus_infinity);
      }
      continue;
    }
    const char* block[kBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) block[b] = keys.at[key / 16 + b];
    const int lane0 = key % 16;
    Vf acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
    }
    if constexpr (kBf16) {
      const int64_t pairs = j.head_dim / 2;
      for (int64_t i = 0; i < pairs; ++i) {
        Vi k[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          k[v] = load_halves(reinterpret_cast<const uint16_t*>(block[v / kPerBlock]) + i * 32 +
                             (lane0 + v % kPerBlock * kLanes) * 2);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vf even = low_half(k[v]), odd = high_half(k[v]);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            acc[r][v] = fma(set1(state.query[r][2 * i]), even, acc[r][v]);
            acc[r][v] = fma(set1(state.query[r][2 * i + 1]), odd, acc[r][v]);
          }
        }
      }
      if (j.head_dim % 2 != 0) {  // the other half of the last pair was never written
        for (int v = 0; v < kVectors; ++v) {
          const Vf last =
              low_half(load_halves(reinterpret_cast<const uint16_t*>(block[v / kPerBlock]) +
                                   pairs * 32 + (lane0 + v % kPerBlock * kLanes) * 2));
          for (int r = 0; r < kRows; ++r) {
            acc[r][v] = fma(set1(state.query[r][2 * pairs]), last, acc[r][v]);
          }
        }
      }
    } else {
      for (int64_t d = 0; d < j.head_dim; ++d) {
        Vf k[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          k[v] = load(reinterpret_cast<const float*>(block[v / kPerBlock]) + d * 16 + lane0 +
                      v % kPerBlock * kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vf q = set1(state.query[r][d]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(q, k[v], acc[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int lane = key + v * kLanes;
        store(&state.scores[r][lane],
              keep_first(mul(acc[r][v], scale), state.keys[r] - lane, minus_infinity));
      }
    }
  }
}

template <int kRows>
static void softmax_tile(AttentionState<kRows>& state) {
  for (int r = 0; r < kRows; ++r) {
    if (state.keys[r] == 0) continue;
    float* s = state.scores[r];
    Vf best = load(s);
    for (int i = kLanes; i < ops::kKeyTile; i += kLanes) best = max(best, load(s + i));
    const float tile_max = max_of(best);
    const float new_max = tile_max > state.max[r] ? tile_max : state.max[r];
    Vf total = zero();
    for (int i = 0; i < ops::kKeyTile; i += kLanes) {
      const Vf p = exp(sub(load(s + i), set1(new_max)));
      store(s + i, p);
      total = add(total, p);
    }
    const Vf correction = exp(set1(state.max[r] - new_max));
    store(&state.correction[r], correction, 1);
    store(&state.sum[r], fma(set1(state.sum[r]), correction, set1(sum(total))), 1);
    state.max[r] = new_max;
  }
}

template <bool kBf16>
PYENGINE_INLINE Vf load_value(const char* block, int64_t element) {
  if constexpr (kBf16) {
    return load_bf16(reinterpret_cast<const uint16_t*>(block) + element);
  } else {
    return load(reinterpret_cast<const float*>(block) + element);
  }
}

// Channels [d0, d0 + kVectors kLanes).
template <bool kBf16, int kRows, int kVectors>
static void add_values(const AttentionJob& j, const TileBlocks& values, int64_t d0, int common_keys,
                       int num_keys, AttentionState<kRows>& state) {
  Vf acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  }
  for (int key0 = 0; key0 < common_keys; key0 += 16) {
    const char* block = values.at[key0 / 16];
    const int end = common_keys < key0 + 16 ? common_keys : key0 + 16;
    int64_t element = d0;
    for (int key = key0; key < end; ++key, element += j.head_dim_v) {
      Vf value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) value[v] = load_value<kBf16>(block, element + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vf p = set1(state.scores[r][key]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(p, value[v], acc[r][v]);
      }
    }
  }
  for (int key = common_keys; key < num_keys; ++key) {  // the diagonal: not all rows see these
    const int64_t element = d0 + key % 16 * j.head_dim_v;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (key >= state.keys[r]) continue;
      const Vf p = set1(state.scores[r][key]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = fma(p, load_value<kBf16>(values.at[key / 16], element + v * kLanes), acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (state.keys[r] == 0) continue;
    const Vf correction = set1(state.correction[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* o = &state.out[r][d0 + v * kLanes];
      store(o, fma(load(o), correction, acc[r][v]));
    }
  }
}

template <bool kBf16, int kRows>
static void attention_rows(const AttentionJob& j, const int32_t* block_table, int64_t head,
                           int64_t token0, int num_rows) {
  constexpr int64_t kSize = kBf16 ? 2 : 4;
  AttentionState<kRows> state;
  const int64_t padded = j.head_dim_v;
  for (int r = 0; r < kRows; ++r) {
    const int row = r < num_rows ? r : num_rows - 1;
    state.query[r] = j.q + (token0 + row) * j.channels + head * j.head_dim;
    state.max[r] = -__builtin_inff();
    state.sum[r] = 0.0f;
    for (int64_t d = 0; d < padded; d += kLanes) store(&state.out[r][d], zero());
  }
  const int last = j.positions[token0 + num_rows - 1];
  const int64_t key_offset = head * j.head_dim_k * 16 * kSize;
  const int64_t value_offset = (j.kv_key_elements + head * j.head_dim_v * 16) * kSize;
  for (int tile = 0; tile <= last; tile += ops::kKeyTile) {
    int common_keys = ops::kKeyTile, num_keys = 0;
    for (int r = 0; r < kRows; ++r) {
      const int seen = j.positions[token0 + (r < num_rows ? r : num_rows - 1)] + 1 - tile;
      const int keys = seen < 0 ? 0 : seen > ops::kKeyTile ? ops::kKeyTile : seen;
      state.keys[r] = keys;
      if (keys < common_keys) common_keys = keys;
      if (keys > num_keys) num_keys = keys;
    }
    TileBlocks keys, values;
    for (int b = 0; b < ops::kKeyTile / 16; ++b) {
      // A block without keys need not exist: the first one's scores stand in and are replaced.
      const int logical = tile / 16 + (b * 16 < num_keys ? b : 0);
      const char* block =
          static_cast<const char*>(j.kv) + block_table[logical] * j.kv_block_elements * kSize;
      keys.at[b] = block + key_offset;
      values.at[b] = block + value_offset;
    }
    score_tile<kBf16, kRows>(j, keys, num_keys, state);
    softmax_tile<kRows>(state);
    int64_t d = 0;
    for (; padded - d >= kValueVectors * kLanes; d += kValueVectors * kLanes) {
      add_values<kBf16, kRows, kValueVectors>(j, values, d, common_keys, num_keys, state);
    }
    for (; d < padded; d += kLanes) {
      add_values<kBf16, kRows, 1>(j, values, d, common_keys, num_keys, state);
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    const int64_t at = (token0 + r) * j.channels + head * j.head_dim;
    const Vf total = set1(state.sum[r]);
    for (int64_t d = 0; d < j.head_dim; d += kLanes) {
      const Vf o = div(load(&state.out[r][d]), total);
      if (j.out_bf16) {
        store_bf16_upto(static_cast<uint16_t*>(j.out) + at + d, o, j.head_dim - d);
      } else {
        store_upto(static_cast<float*>(j.out) + at + d, o, j.head_dim - d);
      }
    }
  }
}

static void run_attention(const AttentionJob& j, const int32_t* block_table, int64_t head,
                          int64_t token0, int num_rows) {
  if (j.kv_bf16) {
    if (num_rows == 1) {
      attention_rows<true, 1>(j, block_table, head, token0, num_rows);
    } else {
      attention_rows<true, kAttentionRows>(j, block_table, head, token0, num_rows);
    }
  } else if (num_rows == 1) {
    attention_rows<false, 1>(j, block_table, head, token0, num_rows);
  } else {
    attention_rows<false, kAttentionRows>(j, block_table, head, token0, num_rows);
  }
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

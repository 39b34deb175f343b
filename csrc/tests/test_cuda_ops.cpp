// The CUDA kernels against float64, on the simulator (test_cuda_ops) or a GPU (test_gpu_ops):
// ragged shapes, every dtype. Each result must be the same bits in several orders of threads and
// blocks, and whatever unwritten memory holds.
#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "cuda/blas.h"
#include "cuda/kernels.h"
#include "tests/cuda_results.h"

namespace {

using namespace pyengine;
using namespace pyengine::cuda;
using namespace pyengine::test;

TEST(embedding) {
  for (DType act : kFloats) {
    for (int channels : {8, 64, 1600}) {
      const int vocab = 11, n_positions = 7;
      const auto wte = normals(vocab * channels, 1, act),
                 wpe = normals(n_positions * channels, 1, act);
      const std::vector<int32_t> ids = {10, 0, 3, 3, 7}, positions = {0, 6, 2, 3, 1};
      const auto x = in_every_schedule([&] {
        Stream stream;
        Array a(stream, act, wte), b(stream, act, wpe), out(stream, DType::f32, 5 * channels);
        Integers i(stream, ids), p(stream, positions);
        Tokens tokens;
        tokens.ids = i.data();
        tokens.positions = p.data();
        tokens.count = 5;
        embed(stream, tokens, a.data(), b.data(), act, channels, out.f32());
        return out.get();
      });
      for (int t = 0; t < 5; ++t) {
        for (int c = 0; c < channels; ++c) {
          CHECK_EQ(x[t * channels + c],
                   wte[ids[t] * channels + c] + wpe[positions[t] * channels + c]);
        }
      }
    }
  }
}

TEST(layer_norms) {
  for (DType act : kFloats) {
    for (int channels : {8, 64, 776, 1600}) {
      auto x = normals(6 * channels, 3);
      for (int c = 0; c < channels; ++c) x[channels + c] += 100;  // a mean that is far away
      const auto gain = normals(channels, 1), bias = normals(channels, 1);
      const std::vector<int32_t> rows = {5, 1, 1, 0};
      const float eps = 1e-5f;
      for (bool chosen : {false, true}) {
        const int n = chosen ? 4 : 6;
        const auto got = in_every_schedule([&] {
          Stream stream;
          Array a(stream, DType::f32, x), g(stream, DType::f32, gain), b(stream, DType::f32, bias);
          Array out(stream, act, n * channels);
          Integers r(stream, rows);
          layer_norm(stream, a.f32(), chosen ? r.data() : nullptr, n, channels,
                     {g.f32(), b.f32(), eps}, out.data(), act);
          return out.get();
        });
        std::vector<double> expected, allowed;
        for (int r = 0; r < n; ++r) {
          const float* row = x.data() + (chosen ? rows[r] : r) * channels;
          double mean = 0, variance = 0;
          for (int c = 0; c < channels; ++c) mean += row[c];
          mean /= channels;
          for (int c = 0; c < channels; ++c) variance += (row[c] - mean) * (row[c] - mean);
          variance /= channels;
          for (int c = 0; c < channels; ++c) {
            const double y = (row[c] - mean) / std::sqrt(variance + eps) * gain[c] + bias[c];
            expected.push_back(y);
            const double lost = 1e-6 * (std::abs(mean) / std::sqrt(variance) + 1);
            allowed.push_back(lost * (std::abs(gain[c]) * 4 + 1) + epsilon(act) * std::abs(y));
          }
        }
        check_close(got, expected, allowed, "layer_norm");
      }
    }
  }
}

struct DenseCase {
  int m, k, n;
  ops::Activation activation;
  Output output;
  bool biased;
};

void check_dense(DType act, const DenseCase& c, bool by_blas) {
  const auto x = normals(c.m * c.k, 1, act), w = normals(c.n * c.k, 0.3f, act);
  const auto bias = normals(c.n, 1, act), before = normals(c.m * c.n, 1);
  const DType out_type = c.output == Output::act ? act : DType::f32;
  const auto got = in_every_schedule([&] {
    Stream stream;
    Array xs(stream, act, x), ws(stream, act, w), b(stream, DType::f32, bias);
    Array of_act(stream, act, bias), out(stream, out_type, c.m * c.n);
    if (c.output == Output::add) out.set(before);
    const auto blas = by_blas ? Blas::open() : nullptr;
    CHECK(!by_blas || blas != nullptr);
    Dense layer{ws.data(), nullptr, nullptr, c.k, c.n};
    if (c.biased) layer.bias = b.f32(), layer.bias_act = of_act.data();
    dense(stream, blas.get(), xs.data(), act, c.m, layer, {c.output, out.data(), c.activation});
    return out.get();
  });
  std::vector<double> expected, allowed;
  for (int r = 0; r < c.m; ++r) {
    for (int j = 0; j < c.n; ++j) {
      double sum = 0, size = 0;
      for (int i = 0; i < c.k; ++i) {
        const double product = double{x[r * c.k + i]} * w[j * c.k + i];
        sum += product;
        size += std::abs(product);
      }
      double y = activated(c.biased ? sum + bias[j] : sum, c.activation);
      if (c.output == Output::add) y += before[r * c.n + j];
      expected.push_back(y);
      // cuBLASLt's tanh is the hardware's where the result is rounded anyway.
      const bool rough = by_blas && c.activation == ops::Activation::gelu_tanh && act != DType::f32;
      allowed.push_back(1e-6 * (size + 2) + epsilon(out_type) * std::abs(y) +
                        (rough ? 0x1p-11 * (std::abs(sum) + std::abs(bias[j])) : 0));
    }
  }
  check_close(got, expected, allowed,
              "dense of " + std::to_string(c.m) + " rows, K " + std::to_string(c.k) + ", N " +
                  std::to_string(c.n));
}

TEST(dense_layers) {
  using ops::Activation;
  const DenseCase cases[] = {
      {1, 64, 96, Activation::none, Output::act, true},
      {2, 264, 33, Activation::gelu_tanh, Output::act, true},
      {3, 776, 17, Activation::none, Output::f32, false},
      {5, 8, 5, Activation::gelu_erf, Output::act, true},
      {8, 512, 20, Activation::none, Output::add, true},
      {3, 3080, 21, Activation::none, Output::add, true},
      {9, 40, 70, Activation::none, Output::add, true},
      {17, 1200, 35, Activation::gelu_tanh, Output::act, true},
      {50, 2104, 18, Activation::none, Output::add, true},
      {64, 64, 64, Activation::relu, Output::act, true},
      {65, 72, 67, Activation::silu, Output::act, false},
      {100, 296, 33, Activation::none, Output::f32, false},
      {130, 48, 140, Activation::gelu_tanh, Output::act, true},
      {200, 8, 129, Activation::none, Output::add, true},
  };
  for (DType act : kFloats) {
    for (const DenseCase& c : cases) {
      for (bool by_blas : {false, true}) check_dense(act, c, by_blas);
    }
  }
}

// A row's result does not depend on the others among few rows; among many neither.
TEST(dense_rows_are_alike_in_any_number) {
  const int k = 264, n = 37;
  for (DType act : kFloats) {
    const auto x = normals(200 * k, 1, act), w = normals(n * k, 0.3f, act);
    auto first = [&](int m, int skip) {
      Stream stream;
      Array xs(stream, act, std::vector<float>(x.begin() + skip * k, x.begin() + (skip + m) * k));
      Array ws(stream, act, w), out(stream, DType::f32, m * n);
      dense(stream, nullptr, xs.data(), act, m, {ws.data(), nullptr, nullptr, k, n},
            {Output::f32, out.data()});
      std::vector<float> y = out.get();
      return std::vector<float>(y.begin() + (7 - skip) * n, y.begin() + (8 - skip) * n);
    };
    const auto few = first(8, 0);  // row 7 each time
    for (int skip : {3, 4, 6, 7}) CHECK(first(8 - skip, skip) == few);
    if (act != DType::f32) {
      for (int m : {9, 31, 64}) CHECK(first(m, 0) == few);
    }
    const auto many = first(act == DType::f32 ? 9 : 65, 0);
    for (int m : {90, 128, 129, 193}) CHECK(first(m, 0) == many);
    CHECK(first(100, 5) == many);
  }
}

// The head has many columns, which are computed by other blocks in the same order for any rows.
TEST(the_head_is_the_same_in_any_number_of_rows) {
  const int k = 72, n = 8200;
  for (DType act : {DType::f16, DType::bf16}) {
    const auto x = normals(33 * k, 1, act), w = normals(n * k, 0.3f, act);
    auto rows = [&](int m) {
      Stream stream;
      Array xs(stream, act, std::vector<float>(x.begin(), x.begin() + m * k)), ws(stream, act, w);
      Array out(stream, DType::f32, m * n);
      dense(stream, nullptr, xs.data(), act, m, {ws.data(), nullptr, nullptr, k, n},
            {Output::f32, out.data()});
      return out.get();
    };
    const auto one = rows(1), many = rows(33);
    CHECK(std::equal(one.begin(), one.end(), many.begin()));
    for (int j = 0; j < n; j += 13) {
      double sum = 0, size = 0;
      for (int i = 0; i < k; ++i) {
        sum += double{x[32 * k + i]} * w[j * k + i];
        size += std::abs(double{x[32 * k + i]} * w[j * k + i]);
      }
      CHECK(std::abs(many[32 * n + j] - sum) <= 1e-6 * (size + 1));
    }
  }
}

TEST(a_dense_layer_of_a_norm_is_both_in_turn) {
  for (DType act : kFloats) {
    for (int k : {8, 264, 776, 1032, 2056}) {
      for (int m : {1, 3, 8, 9, 70}) {
        const int n = 21;
        const auto x = normals(m * k, 2), gain = normals(k, 1), bias = normals(k, 1);
        const auto w = normals(n * k, 0.3f, act), b = normals(n, 1);
        auto computed = [&](bool at_once) {
          Stream stream;
          Array xs(stream, DType::f32, x), ws(stream, act, w), bs(stream, DType::f32, b);
          Array g(stream, DType::f32, gain), o(stream, DType::f32, bias);
          Array normed(stream, act, m * k), out(stream, act, m * n);
          const Norm norm{g.f32(), o.f32(), 1e-5f};
          const Dense layer{ws.data(), bs.f32(), nullptr, k, n};
          const DenseResult result{Output::act, out.data(), ops::Activation::gelu_tanh};
          if (at_once) {
            dense_of_norm(stream, nullptr, xs.f32(), norm, normed.data(), act, m, layer, result);
          } else {
            layer_norm(stream, xs.f32(), nullptr, m, k, norm, normed.data(), act);
            dense(stream, nullptr, normed.data(), act, m, layer, result);
          }
          return out.get();
        };
        CHECK(in_every_schedule([&] { return computed(true); }) == computed(false));
      }
    }
  }
}

std::vector<int32_t> slots_of(const std::vector<int32_t>& positions,
                              const std::vector<int32_t>& sequence,
                              const std::vector<int32_t>& table, int max_blocks) {
  std::vector<int32_t> slots;
  for (size_t t = 0; t < positions.size(); ++t) {
    const int block = table[sequence[t] * max_blocks + positions[t] / kBlockTokens];
    slots.push_back(block * kBlockTokens + positions[t] % kBlockTokens);
  }
  return slots;
}

// Queries to the output, keys and values where write_kv puts them.
TEST(keys_and_values_are_written_by_the_dense_layer) {
  const int n_head = 3, head_dim = 16, channels = n_head * head_dim, k = channels;
  for (DType act : kFloats) {
    for (int m : {3, 20, 70}) {
      const auto x = normals(m * k, 1, act), w = normals(3 * channels * k, 0.3f, act);
      const auto bias = normals(3 * channels, 1);
      const int max_blocks = 3, num_blocks = 2 * max_blocks;
      const std::vector<int32_t> table = {4, 0, 2, 5, 1, 3};
      std::vector<int32_t> positions, sequence;
      for (int i = 0; i < m; ++i) {  // of two sequences
        positions.push_back(i % 2 == 0 ? 47 - i / 2 : i / 2);
        sequence.push_back(i % 2);
      }
      auto computed = [&](bool at_once) {
        Stream stream;
        Array xs(stream, act, x), ws(stream, act, w), b(stream, DType::f32, bias);
        const size_t cache_size = size_t{num_blocks} * channels * kBlockTokens;
        const std::vector<float> nothing(cache_size, 0);
        Array keys(stream, act, nothing), values(stream, act, nothing);
        Array out(stream, act, m * 3 * channels);
        Integers slots(stream, slots_of(positions, sequence, table, max_blocks));
        Tokens tokens;
        tokens.slots = slots.data(), tokens.count = m;
        const KVLayer cache{act, n_head, head_dim, keys.data(), values.data()};
        const Dense layer{ws.data(), b.f32(), nullptr, k, 3 * channels};
        const Output output = at_once ? Output::qkv : Output::act;
        dense(stream, nullptr, xs.data(), act, m, layer,
              {output, out.data(), ops::Activation::none, tokens, cache});
        if (!at_once) write_kv(stream, out.data(), act, tokens, cache);
        std::vector<float> result = keys.get();
        for (float v : values.get()) result.push_back(v);
        const std::vector<float> rows = out.get();
        for (int r = 0; r < m; ++r) {
          result.insert(result.end(), rows.begin() + r * 3 * channels,
                        rows.begin() + r * 3 * channels + channels);
        }
        return result;
      };
      CHECK(in_every_schedule([&] { return computed(true); }) == computed(false));
    }
  }
}

TEST(weights_are_transposed_and_rounded) {
  for (DType from : kFloats) {
    for (DType to : kFloats) {
      for (bool transpose : {false, true}) {
        const int n = 37, k = 72;
        const auto w = normals(n * k, 1, from);
        const auto got = in_every_schedule([&] {
          Stream stream;
          Array src(stream, from, w), dst(stream, to, n * k);
          convert_weight(stream, src.data(), from, transpose, n, k, dst.data(), to);
          return dst.get();
        });
        for (int i = 0; i < n; ++i) {
          for (int j = 0; j < k; ++j) {
            CHECK_EQ(got[i * k + j], rounded(w[transpose ? j * n + i : i * k + j], to));
          }
        }
      }
    }
  }
}

TEST(blocks_are_copied) {
  const auto blocks = normals(6 * 96, 1);
  const auto got = in_every_schedule([&] {
    Stream stream;
    Array a(stream, DType::f32, blocks);
    Integers pairs(stream, {0, 5, 4, 2, 0, 1});
    copy_blocks(stream, a.data(), 96 * 4, pairs.data(), 3);
    return a.get();
  });
  const int from[] = {0, 0, 4, 3, 4, 0};
  for (int b = 0; b < 6; ++b) {
    for (int i = 0; i < 96; ++i) CHECK_EQ(got[b * 96 + i], blocks[from[b] * 96 + i]);
  }
}

// A ragged batch whose earlier tokens are in the cache: context and new tokens of each sequence.
struct Sequence {
  int context, fresh;
};

struct AttentionCase {
  DType act, kv;
  int n_head, head_dim;
  std::vector<Sequence> sequences;
};

struct HostTokens {
  std::vector<int32_t> positions, sequence, single, tiles;
  int longest_single = 1;

  void add(int b, int begin, int end) {
    const auto first = static_cast<int32_t>(positions.size());
    for (int p = begin; p < end; ++p) {
      positions.push_back(p);
      sequence.push_back(b);
    }
    if (end - begin == 1) {
      single.push_back(first);
      longest_single = std::max(longest_single, end);
      return;
    }
    for (int i = 0; i < end - begin; i += kQueryTile) {
      tiles.push_back(first + i);
      tiles.push_back(std::min(kQueryTile, end - begin - i));
    }
  }
};

void check_attention(const AttentionCase& c) {
  const int channels = c.n_head * c.head_dim;
  const auto num_seqs = static_cast<int>(c.sequences.size());
  int max_blocks = 0, num_blocks = 3, total = 0;
  for (const Sequence& s : c.sequences) {
    const int used = (s.context + kBlockTokens - 1) / kBlockTokens;
    max_blocks = std::max(max_blocks, used);
    num_blocks += used;
    total += s.context;
  }
  // Blocks in no order; what a sequence does not use names a block that does not exist.
  std::vector<int32_t> free_blocks(num_blocks), table(num_seqs * max_blocks, 1 << 20);
  std::iota(free_blocks.begin(), free_blocks.end(), 0);
  std::shuffle(free_blocks.begin(), free_blocks.end(), random_engine());
  HostTokens before, fresh;
  std::vector<int> begin_of(num_seqs);
  for (int b = 0, at = 0; b < num_seqs; ++b) {
    const Sequence& s = c.sequences[b];
    for (int i = 0; i * kBlockTokens < s.context; ++i) {
      table[b * max_blocks + i] = free_blocks.back();
      free_blocks.pop_back();
    }
    begin_of[b] = at;
    at += s.context;
    before.add(b, 0, s.context - s.fresh);
    fresh.add(b, s.context - s.fresh, s.context);
  }
  const auto all = normals(static_cast<size_t>(total) * 3 * channels, 1.5f, c.act);
  auto rows_of = [&](const HostTokens& tokens) {
    std::vector<float> rows;
    for (size_t t = 0; t < tokens.positions.size(); ++t) {
      const auto row =
          all.begin() + (begin_of[tokens.sequence[t]] + tokens.positions[t]) * 3 * channels;
      rows.insert(rows.end(), row, row + 3 * channels);
    }
    return rows;
  };
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  const auto got = in_every_schedule([&] {
    Stream stream;
    const size_t elements = static_cast<size_t>(num_blocks) * kBlockTokens * channels;
    DeviceBuffer keys(elements * size_of(c.kv), "keys"), values(elements * size_of(c.kv), "values");
    DeviceBuffer key_scales(elements / c.head_dim * 4, "scales"),
        value_scales(elements / c.head_dim * 4, "scales");
    KVLayer cache;
    cache.dtype = c.kv;
    cache.n_head = c.n_head;
    cache.head_dim = c.head_dim;
    cache.keys = keys.data();
    cache.values = values.data();
    cache.key_scales = key_scales.as<float>();
    cache.value_scales = value_scales.as<float>();
    Integers device_table(stream, table);
    std::vector<float> result;
    for (const HostTokens* host : {&before, &fresh}) {
      if (host->positions.empty()) continue;
      Array qkv(stream, c.act, rows_of(*host));
      Integers positions(stream, host->positions), sequence(stream, host->sequence);
      Integers slots(stream, slots_of(host->positions, host->sequence, table, max_blocks));
      Integers single(stream, host->single), tiles(stream, host->tiles);
      Tokens tokens;
      tokens.positions = positions.data();
      tokens.slots = slots.data();
      tokens.sequence = sequence.data();
      tokens.block_table = device_table.data();
      tokens.count = static_cast<int32_t>(host->positions.size());
      tokens.max_blocks = max_blocks;
      write_kv(stream, qkv.data(), c.act, tokens, cache);
      stream.wait();
      if (host == &before) continue;
      AttentionPlan plan;
      plan.single = single.data();
      plan.tiles = tiles.data();
      plan.num_single = static_cast<int32_t>(host->single.size());
      plan.num_tiles = static_cast<int32_t>(host->tiles.size() / 2);
      plan.segments = (host->longest_single + kDecodeSegment - 1) / kDecodeSegment;
      Array partial(stream, DType::f32,
                    partial_floats(plan.num_single, c.n_head, c.head_dim, plan.segments));
      plan.partial = partial.f32();
      Array out(stream, c.act, host->positions.size() * channels);
      attention(stream, qkv.data(), c.act, tokens, plan, cache, scale, out.data());
      result = out.get();
    }
    return result;
  });

  // Keys and values as the cache keeps them.
  std::vector<float> kept = all;
  if (c.kv == DType::i8) {
    for (size_t i = 0; i < kept.size(); i += c.head_dim) {
      if (i / channels % 3 == 0) continue;
      float largest = 0;
      for (int d = 0; d < c.head_dim; ++d) largest = std::max(largest, std::abs(kept[i + d]));
      for (int d = 0; d < c.head_dim; ++d) {
        kept[i + d] = std::nearbyint(kept[i + d] * (127 / largest)) * (largest / 127);
      }
    }
  }
  std::vector<double> expected, allowed;
  for (size_t t = 0; t < fresh.positions.size(); ++t) {
    const int first = begin_of[fresh.sequence[t]], n = fresh.positions[t] + 1;
    for (int h = 0; h < c.n_head; ++h) {
      const float* q =
          all.data() + static_cast<size_t>(first + n - 1) * 3 * channels + h * c.head_dim;
      std::vector<double> p(n);
      for (int j = 0; j < n; ++j) {
        const float* key =
            kept.data() + (static_cast<size_t>(first + j) * 3 + 1) * channels + h * c.head_dim;
        double score = 0;
        for (int d = 0; d < c.head_dim; ++d) score += double{q[d]} * key[d];
        p[j] = score * scale;
      }
      const double best = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - best);
      for (int d = 0; d < c.head_dim; ++d) {
        double y = 0, size = 0;
        for (int j = 0; j < n; ++j) {
          const double v =
              kept[(static_cast<size_t>(first + j) * 3 + 2) * channels + h * c.head_dim + d];
          y += p[j] / sum * v;
          size += p[j] / sum * std::abs(v);
        }
        expected.push_back(y);
        // Weights are rounded to the dtype on tensor cores, and the result once everywhere.
        allowed.push_back(1e-5 * (size + 0.1) +
                          epsilon(c.act) * (std::abs(y) + (c.act == DType::f32 ? 0 : size)));
      }
    }
  }
  check_close(got, expected, allowed,
              "attention in " + std::string(name_of(c.act)) + ", cache " + name_of(c.kv) +
                  ", head_dim " + std::to_string(c.head_dim));
}

TEST(attention_over_ragged_batches) {
  const std::vector<Sequence> ragged = {{1, 1}, {40, 40}, {17, 1}, {130, 67}, {300, 1}, {2, 2}};
  const std::vector<Sequence> long_contexts = {{2000, 1}, {513, 3}};
  const std::vector<Sequence> singles = {{16, 1}, {256, 1}, {1, 1}};
  for (DType act : kFloats) {
    for (int head_dim : {32, 64, 80, 128}) check_attention({act, act, 1, head_dim, ragged});
    if (std::getenv("PYENGINE_TEST_QUICK") != nullptr) continue;
    check_attention({act, act, 1, 64, long_contexts});
    for (DType kv : {act, DType::i8}) {
      check_attention({act, kv, 2, 8, ragged});
      check_attention({act, kv, 1, 80, singles});
      check_attention({act, kv, 1, 256, singles});
      check_attention({act, kv, 2, 96, {{33, 33}, {100, 1}}});
    }
  }
}

}  // namespace

// The CPU operations against their definition in ops.h, for every instruction set of this machine:
// dense layers bit for bit against scalar chains, the rest against float64, and batch invariance.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "cpu/dispatch.h"
#include "ops/ops.h"
#include "random_tensors.h"

namespace {

using namespace pyengine;
using namespace pyengine::ops;
using namespace pyengine::testing;

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

struct Context {
  ThreadPool pool;
  Arena arena;
  ExecContext ctx;
  Context(int threads, const std::string& isa)
      : pool(threads), ctx{pool, arena, cpu::kernels_for(isa.c_str())} {}
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

float multiply_add(float x, float w, float s, bool fused) {
  if (fused) return std::fmaf(x, w, s);
  volatile float product = x * w;
  return product + s;
}

enum class Order { fused, rounded, tiles };

// One element of a dense layer exactly as ops.h defines it.
float chain(const Tensor& x, int64_t row, const Tensor& w, int64_t col, int64_t in, int64_t out,
            WeightLayout layout, Order order) {
  auto xs = [&](int64_t k) { return x.f32[row * in + k]; };
  auto ws = [&](int64_t k) {
    return layout == WeightLayout::in_out ? w.f32[k * out + col] : w.f32[col * in + k];
  };
  const bool fused = order != Order::rounded;
  float y = 0.0f;
  if (order == Order::tiles && x.dtype == DType::bf16) {
    for (int64_t k0 = 0; k0 < in; k0 += 32) {
      float sums[2] = {0.0f, 0.0f};
      for (int64_t k = k0; k < std::min<int64_t>(k0 + 32, in); ++k) {
        sums[k % 2] = std::fmaf(xs(k), ws(k), sums[k % 2]);
      }
      y += sums[0] + sums[1];
    }
    return y;
  }
  for (int64_t k0 = 0; k0 < in; k0 += kReductionBlock) {
    const int64_t end = std::min<int64_t>(k0 + kReductionBlock, in);
    float s = 0.0f;
    if (x.dtype == DType::bf16) {
      for (int64_t k = k0; k < end; k += 2) {
        if (k + 1 < end) s = multiply_add(xs(k + 1), ws(k + 1), s, fused);
        s = multiply_add(xs(k), ws(k), s, fused);
      }
    } else {
      for (int64_t k = k0; k < end; ++k) s = multiply_add(xs(k), ws(k), s, fused);
    }
    y = k0 == 0 ? s : y + s;
  }
  return y;
}

void test_linear(const std::string& isa, DType dtype, int64_t rows, int64_t in, int64_t out,
                 WeightLayout layout, int threads) {
  const std::string what = isa + " linear " + name_of(dtype) + " rows " + std::to_string(rows) +
                           " in " + std::to_string(in) + " out " + std::to_string(out) +
                           (layout == WeightLayout::in_out ? " in_out" : " out_in");
#if defined(__aarch64__)
  const Order order = Order::fused;
#else
  const Order order = isa == "amx"        ? Order::tiles
                      : isa == "baseline" ? Order::rounded
                                          : Order::fused;
#endif
  Context c(threads, isa);
  Tensor x(dtype, rows * in, 1.0f), w(dtype, in * out, 0.1f);
  std::vector<float> bias(out), expected(rows * out);
  for (float& b : bias) b = normal();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < out; ++n) {
      expected[r * out + n] = chain(x, r, w, n, in, out, layout, order) + bias[n];
    }
  }
  const GuardedCopy guarded(w.data(), in * out * size_of(dtype));
  Weight weight{guarded.data(), dtype, layout, in, out};
  std::vector<float> y(rows * out, NAN);
  linear(c.ctx, x.data(), rows, weight, bias.data(), Activation::none, y.data(), DType::f32);
  check(same(y, expected), what);

  // Packed, converted as it is packed or not.
  AlignedBuffer words(packed_words(dtype, in, out) * 4);
  for (DType from : {dtype, DType::f32}) {
    const Weight source{from == dtype ? guarded.data() : w.f32.data(), from, layout, in, out};
    std::memset(words.data(), 0xff, words.size());
    pack(c.ctx, source, dtype, words.data());
    const Weight packed{words.data(), dtype, WeightLayout::packed, in, out};
    std::vector<float> z(rows * out, NAN);
    linear(c.ctx, x.data(), rows, packed, bias.data(), Activation::none, z.data(), DType::f32);
    check(same(z, expected), what + " packed");
  }

  // The rows one by one, as bf16, and added to a residual stream.
  std::vector<float> alone(rows * out, NAN), residual(rows * out), sums(rows * out);
  std::vector<uint16_t> half(rows * out);
  for (int64_t r = 0; r < rows; ++r) {
    linear(c.ctx, x.row(r * in), 1, weight, bias.data(), Activation::none, alone.data() + r * out,
           DType::f32);
  }
  check(same(alone, expected), what + " row by row");
  linear(c.ctx, x.data(), rows, weight, bias.data(), Activation::none, half.data(), DType::bf16);
  for (int64_t i = 0; i < rows * out; ++i) {
    residual[i] = normal();
    sums[i] = residual[i] + expected[i];
    if (half[i] != narrow(expected[i])) return check(false, what + " to bf16");
  }
  linear_residual(c.ctx, x.data(), rows, weight, bias.data(), residual.data());
  check(same(residual, sums), what + " residual");
}

double activation(Activation kind, double x) {
  switch (kind) {
    case Activation::none:
      return x;
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::gelu_erf:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::silu:
      return x / (1 + std::exp(-x));
  }
  return NAN;
}

void test_activations(const std::string& isa) {
  Context c(1, isa);
  const int64_t n = quick ? 4001 : 40001;
  std::vector<float> w(n), y(n);
  for (int64_t i = 0; i < n; ++i) w[i] = static_cast<float>(i - n / 2) * (68.0f / n);
  const float one = 1.0f;
  Weight weight{w.data(), DType::f32, WeightLayout::in_out, 1, n};
  for (Activation kind : {Activation::none, Activation::gelu_tanh, Activation::gelu_erf,
                          Activation::relu, Activation::silu}) {
    linear(c.ctx, &one, 1, weight, nullptr, kind, y.data(), DType::f32);
    double worst = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double scale = std::max(1.0, std::fabs(static_cast<double>(w[i])));
      worst = std::max(worst, std::fabs(y[i] - activation(kind, w[i])) / scale);
    }
    check(worst <= 2e-7, isa + " activation " + std::to_string(static_cast<int>(kind)) + " error " +
                             std::to_string(worst * 1e7) + "e-7");
  }
}

void test_layer_norm(const std::string& isa, int64_t channels) {
  Context c(2, isa);
  const int64_t rows = 21;
  std::vector<float> x(rows * channels), gain(channels), bias(channels), out(rows * channels);
  for (float& v : x) v = normal() * 3 + 1;
  for (float& v : gain) v = 1 + 0.3f * normal();
  for (float& v : bias) v = normal();
  std::vector<int32_t> order(rows);
  for (int64_t r = 0; r < rows; ++r) order[r] = static_cast<int32_t>(rows - 1 - r);
  layer_norm(c.ctx, x.data(), order.data(), rows, channels, gain.data(), bias.data(), 1e-5f,
             out.data(), DType::f32);
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = &x[order[r] * channels];
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < channels; ++i) mean += row[i];
    mean /= channels;
    for (int64_t i = 0; i < channels; ++i) variance += (row[i] - mean) * (row[i] - mean);
    variance /= channels;
    for (int64_t i = 0; i < channels; ++i) {
      const double y = (row[i] - mean) / std::sqrt(variance + 1e-5) * gain[i] + bias[i];
      worst = std::max(worst, std::fabs(y - out[r * channels + i]));
    }
  }
  check(worst < 4e-6,
        isa + " layer_norm " + std::to_string(channels) + " error " + std::to_string(worst));
  std::vector<uint16_t> half(rows * channels);
  layer_norm(c.ctx, x.data(), order.data(), rows, channels, gain.data(), bias.data(), 1e-5f,
             half.data(), DType::bf16);
  for (size_t i = 0; i < half.size(); ++i) {
    if (half[i] != narrow(out[i])) return check(false, isa + " layer_norm to bf16");
  }
}

// qkv and attention over a paged cache full of NaN, several sequences in chunks, against float64.
void test_attention(const std::string& isa, DType act, DType kv_dtype, int heads, int head_dim) {
  const std::string what = isa + " attention " + name_of(act) + " kv " + name_of(kv_dtype) +
                           " heads " + std::to_string(heads) + " head_dim " +
                           std::to_string(head_dim);
  const int64_t channels = static_cast<int64_t>(heads) * head_dim;
  // The second crosses from one segment of keys to the next.
  const std::vector<int> lengths = {1, quick ? 270 : 300, 64, 17};
  const int max_blocks = 20, num_blocks = 80, seqs = static_cast<int>(lengths.size());
  int total = 0;
  for (int n : lengths) total += n;
  Tensor x(act, total * channels, 1.0f),
      w(act, channels * 3 * channels, 1.0f / std::sqrt(channels));
  std::vector<float> bias(3 * channels);
  for (float& b : bias) b = 0.3f * normal();
  std::vector<int32_t> table(seqs * max_blocks);
  for (size_t i = 0; i < table.size(); ++i)
    table[i] = static_cast<int32_t>((i * 7 + 3) % num_blocks);
  const KVLayout layout{kv_dtype, heads, head_dim};
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));

  // Runs all sequences in chunks of at most `chunk` tokens; returns q and out of every token.
  auto run = [&](int threads, int chunk, std::vector<char>& cache, std::vector<float>& all_q) {
    Context c(threads, isa);
    cache.assign(layout.block_bytes() * num_blocks, static_cast<char>(0xff));  // NaN in every dtype
    const KVLayerView view{layout, cache.data(), num_blocks};
    std::vector<float> all(total * channels);
    all_q.assign(total * channels, 0.0f);
    for (int start = 0; start < lengths[1]; start += chunk) {
      std::vector<int32_t> positions, query_start{0}, context_len, tables, source;
      int first = 0;
      for (int b = 0; b < seqs; ++b) {
        const int end = std::min(start + chunk, lengths[b]);
        if (start < end) {
          for (int p = start; p < end; ++p) {
            positions.push_back(p);
            source.push_back(first + p);
          }
          query_start.push_back(static_cast<int32_t>(positions.size()));
          context_len.push_back(end);
          tables.insert(tables.end(), table.begin() + b * max_blocks,
                        table.begin() + (b + 1) * max_blocks);
        }
        first += lengths[b];
      }
      const int64_t tokens = static_cast<int64_t>(positions.size());
      RaggedBatch batch;
      batch.positions = positions.data();
      batch.query_start = query_start.data();
      batch.context_len = context_len.data();
      batch.block_table = tables.data();
      batch.num_tokens = static_cast<int32_t>(tokens);
      batch.num_seqs = static_cast<int32_t>(context_len.size());
      batch.max_blocks = max_blocks;
      Tensor part(act, tokens * channels, 1.0f);
      std::vector<float> q(tokens * channels), out(tokens * channels);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < channels; ++i) {
          part.f32[t * channels + i] = x.f32[source[t] * channels + i];
          if (act == DType::bf16) part.bf16[t * channels + i] = x.bf16[source[t] * channels + i];
        }
      }
      Weight weight{w.data(), act, WeightLayout::in_out, channels, 3 * channels};
      qkv(c.ctx, part.data(), weight, bias.data(), batch, q.data(), view);
      attention(c.ctx, q.data(), batch, view, scale, out.data(), DType::f32);
      for (int64_t t = 0; t < tokens; ++t) {
        std::memcpy(&all[source[t] * channels], &out[t * channels], channels * 4);
        std::memcpy(&all_q[source[t] * channels], &q[t * channels], channels * 4);
      }
    }
    return all;
  };
  std::vector<char> cache, cache2;
  std::vector<float> q, q2;
  const std::vector<float> whole = run(2, lengths[1], cache, q);

  // Element `element` of one head's keys or values of a block, of its token `token`.
  auto stored = [&](const char* head, int64_t element, int token) {
    if (kv_dtype == DType::bf16)
      return double{widen(reinterpret_cast<const uint16_t*>(head)[element])};
    const auto* floats = reinterpret_cast<const float*>(head);
    if (kv_dtype == DType::f32) return double{floats[element]};
    return double{floats[token]} * (reinterpret_cast<const uint8_t*>(head + 64)[element] - 128);
  };
  // What the cache makes of channel `d` of a head.
  auto rounded = [&](const float* head, int d) {
    if (kv_dtype == DType::f32) return double{head[d]};
    if (kv_dtype == DType::bf16) return double{widen(narrow(head[d]))};
    float peak = 0;
    for (int i = 0; i < head_dim; ++i) peak = std::max(peak, std::fabs(head[i]));
    const float shift = 12582912.0f;  // rounds half to even
    const float n = multiply_add(head[d], 127.0f / peak, shift, false) - shift;
    return double{peak * (1.0f / 127.0f)} * n;
  };
  // k and v as the cache must hold them, from the plain product.
  Context c(1, isa);
  std::vector<float> projected(total * 3 * channels);
  Weight weight{w.data(), act, WeightLayout::in_out, channels, 3 * channels};
  linear(c.ctx, x.data(), total, weight, bias.data(), Activation::none, projected.data(),
         DType::f32);
  double worst = 0;
  int first = 0;
  bool cached_right = true;
  for (int b = 0; b < seqs; ++b) {
    for (int h = 0; h < heads; ++h) {
      std::vector<std::vector<double>> keys, values;
      for (int p = 0; p < lengths[b]; ++p) {
        const char* block = cache.data() + table[b * max_blocks + p / 16] *
                                               static_cast<int64_t>(layout.block_bytes());
        const char* key = block + h * layout.key_bytes();
        const char* value = block + layout.values_at() + h * layout.value_bytes();
        const int slot = p % 16;
        keys.emplace_back();
        values.emplace_back();
        for (int d = 0; d < head_dim; ++d) {
          const int word = 4 / static_cast<int>(size_of(kv_dtype));  // elements of one
          keys.back().push_back(stored(key, (d / word * 16 + slot) * word + d % word, slot));
          values.back().push_back(
              stored(value, (slot / word * layout.head_dim_v() + d) * word + slot % word, slot));
          const float* token = &projected[(first + p) * 3 * channels];
          const int64_t at = h * head_dim + d;
          const float* token_head = token + h * head_dim;
          cached_right = cached_right && keys.back().back() == rounded(token_head + channels, d) &&
                         values.back().back() == rounded(token_head + 2 * channels, d) &&
                         q[(first + p) * channels + at] == token[at];
        }
      }
      for (int p = 0; p < lengths[b]; ++p) {
        std::vector<double> weights(p + 1), o(head_dim);
        double best = -1e300, sum = 0;
        const int64_t at = (first + p) * channels + h * head_dim;
        for (int k = 0; k <= p; ++k) {
          for (int d = 0; d < head_dim; ++d) weights[k] += q[at + d] * keys[k][d];
          weights[k] *= scale;
          best = std::max(best, weights[k]);
        }
        for (int k = 0; k <= p; ++k) {
          weights[k] = std::exp(weights[k] - best);
          sum += weights[k];
        }
        for (int d = 0; d < head_dim; ++d) {
          for (int k = 0; k <= p; ++k) o[d] += weights[k] / sum * values[k][d];
          const double error = std::fabs(o[d] - whole[at + d]);
          worst = error <= worst ? worst : error;  // NaN wins
        }
      }
    }
    first += lengths[b];
  }
  check(cached_right, what + " qkv");
  // AMX rounds queries and probabilities to bf16; over an i8 cache they have 16 bits.
  const double tolerance = kv_dtype == DType::i8                    ? 1e-3
                           : isa == "amx" && kv_dtype != DType::f32 ? 2e-2
                                                                    : 3e-6;
  check(worst < tolerance, what + " error " + std::to_string(worst * 1e6) + "e-6");
  for (int chunk : quick ? std::vector<int>{1, 37} : std::vector<int>{1, 5, 16, 37, 100, 270}) {
    check(same(whole, run(1 + chunk % 3, chunk, cache2, q2)) && same(q, q2),
          what + " in chunks of " + std::to_string(chunk));
  }
}

// Logits as `linear` makes them, and the largest of each 64.
void test_head(const std::string& isa, DType dtype, int64_t rows, int64_t vocab) {
  const std::string what = isa + " head " + name_of(dtype) + " rows " + std::to_string(rows);
  constexpr int64_t kIn = 40, kBlock = kLogitBlock;
  const int64_t blocks = padded_to(vocab, kBlock) / kBlock;
  Tensor x(dtype, rows * kIn, 1.0f), w(dtype, vocab * kIn, 0.3f);
  const Weight head_weight{w.data(), dtype, WeightLayout::out_in, kIn, vocab};
  std::vector<float> expected(rows * vocab), logits(rows * vocab), block_max(rows * blocks);
  for (int threads : {1, 3}) {
    Context c(threads, isa);
    linear(c.ctx, x.data(), rows, head_weight, nullptr, Activation::none, expected.data(),
           DType::f32);
    head(c.ctx, x.data(), rows, head_weight, logits.data(), block_max.data());
    bool right = same(expected, logits);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = &logits[r * vocab];
      for (int64_t b = 0; b < blocks; ++b) {
        const float* last = row + std::min(vocab, (b + 1) * kBlock);
        right = right && block_max[r * blocks + b] == *std::max_element(row + b * kBlock, last);
      }
    }
    check(right, what + " threads " + std::to_string(threads));
  }
  if (dtype != DType::f32) return;
  w.f32[70 * kIn] = std::numeric_limits<float>::infinity();
  Context c(1, isa);
  head(c.ctx, x.data(), rows, head_weight, logits.data(), block_max.data());
  int64_t wrong = 0;
  for (int64_t i = 0; i < rows * blocks; ++i)
    wrong += std::isnan(block_max[i]) != (i % blocks == 1);
  check(wrong == 0, what + " not finite");
}

void test_score(const std::string& isa, DType dtype, int64_t rows, int64_t in, int64_t vocab) {
  const std::string what = isa + " score_rows " + name_of(dtype) + " rows " + std::to_string(rows) +
                           " vocab " + std::to_string(vocab);
  Tensor x(dtype, rows * in, 1.0f), w(dtype, vocab * in, 0.3f);
  for (int64_t i = 0; i < in; ++i) {  // equal logits: the lower id comes first
    w.f32[(vocab - 1) * in + i] = w.f32[(vocab / 2) * in + i];
    if (dtype == DType::bf16) w.bf16[(vocab - 1) * in + i] = w.bf16[(vocab / 2) * in + i];
  }
  Weight head{w.data(), dtype, WeightLayout::out_in, in, vocab};
  std::vector<int32_t> targets(rows);
  for (int32_t& t : targets) t = uniform(0, static_cast<int>(vocab) - 1);
  const int top_n = 7;
  std::vector<float> logits(rows * vocab), first, first_top;
  std::vector<int32_t> first_ids;
  for (int threads : {1, 3}) {
    Context c(threads, isa);
    std::vector<float> logprobs(rows), top(rows * top_n);
    std::vector<int32_t> ids(rows * top_n);
    score_rows(c.ctx, x.data(), rows, head, targets.data(), top_n, logprobs.data(), ids.data(),
               top.data());
    if (threads == 1) {
      linear(c.ctx, x.data(), rows, head, nullptr, Activation::none, logits.data(), DType::f32);
      first = logprobs;
      first_ids = ids;
      first_top = top;
      std::vector<float> one(1), one_top(top_n);
      std::vector<int32_t> one_ids(top_n);
      score_rows(c.ctx, x.row((rows - 1) * in), 1, head, &targets[rows - 1], top_n, one.data(),
                 one_ids.data(), one_top.data());
      check(one[0] == logprobs[rows - 1] && one_top[top_n - 1] == top[rows * top_n - 1],
            what + " one row alone");
    }
    check(same(first, logprobs) && same(first_top, top) && first_ids == ids,
          what + " at " + std::to_string(threads) + " threads");
  }
  // The log-sum-exp of logits in memory is that of the tiles, bit for bit.
  Context c(2, isa);
  std::vector<int32_t> reversed(rows);
  std::vector<double> totals(rows);
  for (int64_t r = 0; r < rows; ++r) reversed[r] = static_cast<int32_t>(rows - 1 - r);
  log_sum_exp(c.ctx, logits.data(), vocab, reversed.data(), rows, totals.data());
  for (int64_t r = 0; r < rows; ++r) {
    const double logprob = logits[r * vocab + targets[r]] - totals[rows - 1 - r];
    if (first[r] != static_cast<float>(logprob)) return check(false, what + " log_sum_exp");
  }
  double worst = 0;
  bool order = true;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = &logits[r * vocab];
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(row[i]));
    worst = std::max(worst, std::fabs(first[r] - (row[targets[r]] - std::log(sum))));
    std::vector<int32_t> ids(vocab);
    for (int64_t i = 0; i < vocab; ++i) ids[i] = static_cast<int32_t>(i);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    for (int i = 0; i < top_n; ++i) {
      order = order &&
              (i >= vocab ? first_ids[r * top_n + i] == -1 : first_ids[r * top_n + i] == ids[i]);
      if (i >= vocab) continue;
      worst = std::max(worst, std::fabs(first_top[r * top_n + i] - (row[ids[i]] - std::log(sum))));
    }
  }
  check(order, what + " best tokens");
  check(worst < 4e-6, what + " error " + std::to_string(worst * 1e6) + "e-6");
}

// f16 by its definition, one bit pattern at a time.
double f16_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double sign = h >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

void test_convert(const std::string& isa) {
  Context c(2, isa);
  std::vector<uint16_t> all(65536), back(65536);
  std::vector<float> f(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  for (DType dtype : {DType::f16, DType::bf16}) {
    convert(c.ctx, all.data(), dtype, f.data(), DType::f32,
            65535);  // one lane short of whole vectors
    convert(c.ctx, f.data(), DType::f32, back.data(), dtype, 65535);
    for (int i = 0; i < 65535; ++i) {
      const double value = dtype == DType::f16 ? f16_value(all[i]) : widen(all[i]);
      const bool ok = std::isnan(value) ? std::isnan(f[i]) : f[i] == value && back[i] == all[i];
      if (!ok) return check(false, isa + " convert " + name_of(dtype) + " " + std::to_string(i));
    }
  }
  // Halfway cases go to the even neighbour, and out of range to infinity.
  std::vector<float> edges;
  for (int i = 0; i < 0x7bff; ++i) {
    edges.push_back(static_cast<float>((f16_value(i) + f16_value(i + 1)) / 2));
  }
  edges.push_back(65519.9f);
  edges.push_back(65520.0f);
  edges.push_back(NAN);
  convert(c.ctx, edges.data(), DType::f32, back.data(), DType::f16, edges.size());
  for (int i = 0; i < 0x7bff; ++i) {
    if (back[i] != i + i % 2)
      return check(false, isa + " convert to f16, halfway " + std::to_string(i));
  }
  check(back[0x7bff] == 0x7bff && back[0x7c00] == 0x7c00 && std::isnan(f16_value(back[0x7c01])),
        isa + " convert to f16, ends");
  const float nan = NAN, halfway = 1.00390625f;  // between bf16 1 and 1 + 2^-7
  convert(c.ctx, &nan, DType::f32, back.data(), DType::bf16, 1);
  convert(c.ctx, &halfway, DType::f32, back.data() + 1, DType::bf16, 1);
  check(std::isnan(widen(back[0])) && back[1] == 0x3f80, isa + " convert to bf16");
}

void test_embed_and_copy(const std::string& isa) {
  Context c(2, isa);
  for (DType dtype : {DType::f32, DType::bf16}) {
    const int64_t channels = 37;
    Tensor wte(dtype, 11 * channels, 1.0f), wpe(dtype, 20 * channels, 1.0f);
    std::vector<int32_t> ids = {10, 0, 3}, positions = {0, 19, 7};
    RaggedBatch batch;
    batch.token_ids = ids.data();
    batch.positions = positions.data();
    batch.num_tokens = 3;
    std::vector<float> x(3 * channels), expected(3 * channels);
    for (int t = 0; t < 3; ++t) {
      for (int64_t i = 0; i < channels; ++i) {
        expected[t * channels + i] =
            wte.f32[ids[t] * channels + i] + wpe.f32[positions[t] * channels + i];
      }
    }
    Weight table{wte.data(), dtype, WeightLayout::out_in, channels, 11};
    embed(c.ctx, batch, table, wpe.data(), dtype, x.data());
    check(same(x, expected), isa + " embed " + name_of(dtype));
    AlignedBuffer packed(packed_words(dtype, channels, 11) * 4);
    pack(c.ctx, table, dtype, packed.data());
    table.data = packed.data();
    table.layout = WeightLayout::packed;
    x.assign(x.size(), 0.0f);
    embed(c.ctx, batch, table, wpe.data(), dtype, x.data());
    check(same(x, expected), isa + " embed from a packed table of " + name_of(dtype));
    const KVLayout layout{dtype, 2, 5};
    std::vector<uint8_t> cache(layout.block_bytes() * 5);
    for (size_t i = 0; i < cache.size(); ++i)
      cache[i] = static_cast<uint8_t>(i / layout.block_bytes());
    const std::vector<int32_t> pairs = {0, 4, 3, 1};
    copy_blocks(c.ctx, KVLayerView{layout, cache.data(), 5}, pairs.data(), 2);
    for (size_t i = 0; i < cache.size(); ++i) {
      const int block[] = {0, 3, 2, 3, 0};
      if (cache[i] != block[i / layout.block_bytes()]) return check(false, isa + " copy_blocks");
    }
  }
}

}  // namespace

int main() {
  std::vector<std::string> isas = cpu::available_isas();
  if (const char* only = std::getenv("PYENGINE_ISA")) isas = {only};
  for (const std::string& isa : isas) {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (WeightLayout layout : {WeightLayout::in_out, WeightLayout::out_in}) {
        // Rows, inputs, outputs; the first ones are those of a quick run.
        const int64_t shapes[][3] = {{1, 1, 1},      {3, 20, 97},    {9, 257, 50},  {1, 515, 131},
                                     {70, 30, 131},  {1, 20, 97},    {17, 256, 96}, {5, 511, 385},
                                     {2, 768, 400},  {70, 300, 131}, {8, 512, 48},  {4, 33, 1000},
                                     {130, 64, 200}, {1, 1030, 800}};
        int threads = 1;
        for (const auto& s : shapes) {
          if (quick && threads > 5) break;
          test_linear(isa, dtype, s[0], s[1], s[2], layout, 1 + threads++ % 3);
        }
        for (int i = 0; i < (quick ? 3 : 12); ++i) {
          test_linear(isa, dtype, uniform(1, 20), uniform(1, quick ? 300 : 600),
                      uniform(1, quick ? 100 : 200), layout, 2);
        }
      }
      test_attention(isa, dtype, dtype, 3, 20);
      test_attention(isa, dtype, DType::bf16, 1, 7);
      test_attention(isa, dtype, DType::i8, 2, 9);
      test_head(isa, dtype, 3, 1000);
      test_head(isa, dtype, 37, 200);
      test_score(isa, dtype, 5, 40, 1000);
      test_score(isa, dtype, 3, 31, 4);
      if (quick) continue;
      test_attention(isa, dtype, dtype, 2, 64);
      test_attention(isa, dtype, DType::f32, 1, 80);
      test_score(isa, dtype, 300, 24, 777);
    }
    if (!quick) {
      test_attention(isa, DType::f32, DType::bf16, 2, 128);
      test_attention(isa, DType::f32, DType::i8, 2, 64);
      test_attention(isa, DType::f32, DType::i8, 1, 80);
    }
    test_activations(isa);
    for (int64_t channels : {1, 7, 64, 100, 768, 1027}) test_layer_norm(isa, channels);
    test_convert(isa);
    test_embed_and_copy(isa);
    std::printf("%s: done\n", isa.c_str());
  }
  if (failures != 0) std::printf("%d checks failed\n", failures);
  return failures != 0;
}

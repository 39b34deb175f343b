// The CUDA kernels of int8 and int4 weights against float64, on the simulator (test_cuda_quantized)
// or a GPU (test_gpu_quantized): what a file holds, by the formulas of docs/quantization.md.
#include <algorithm>
#include <deque>
#include <random>

#include "core/errors.h"
#include "cuda/kernels.h"
#include "kv/kv_cache.h"
#include "model/device_gpt2.h"
#include "tests/cuda_results.h"
#include "tests/tiny_model.h"

namespace {

using namespace pyengine;
using namespace pyengine::cuda;
using namespace pyengine::test;

int random_below(int n) { return static_cast<int>(random_engine()() % n); }

// The integers (N, K) of a matrix as it lies in a file; groups: null for int8.
std::vector<int> integers_of(const uint8_t* bytes, const uint8_t* groups, int k, int n) {
  const int padded = (k + 63) / 64 * 64;
  std::vector<int> integers;
  for (int c = 0; c < n; ++c) {
    const int tile = c / 16, lane = c % 16;
    for (int i = 0; i < k; ++i) {
      if (groups == nullptr) {
        integers.push_back(bytes[tile * padded * 16 + i / 4 * 64 + lane * 4 + i % 4] - 128);
        continue;
      }
      const int byte = bytes[tile * padded * 8 + i / 8 * 64 + lane * 4 + i % 4];
      const int group = groups[tile * padded / 2 + i / 32 * 16 + lane];
      const int nibble = i % 8 < 4 ? byte % 16 : byte / 16;
      integers.push_back(group % 16 * (nibble - group / 16));
    }
  }
  return integers;
}

// A matrix of a file. What it is padded with is as random as the rest: none of it may reach a
// result.
struct HostMatrix {
  int k, n;
  bool nibbles;
  std::vector<uint8_t> bytes, groups;
  std::vector<float> scale;
  std::vector<int> integer;  // (N, K)

  HostMatrix(int k, int n, bool nibbles)
      : k(k),
        n(n),
        nibbles(nibbles),
        bytes(nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n)),
        groups(nibbles ? ops::group_bytes(k, n) : 0),
        scale(n) {
    for (float& s : scale) s = 0.001f + 0.001f * static_cast<float>(random_below(20));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_below(256));
    for (uint8_t& byte : groups) {
      const int zero = 4 + random_below(8), most = 127 / std::max(zero, 15 - zero);
      byte = static_cast<uint8_t>(1 + random_below(most) + 16 * zero);
    }
    integer = integers_of(bytes.data(), nibbles ? groups.data() : nullptr, k, n);
  }
};

// The same on the device.
class DeviceMatrix {
 public:
  DeviceMatrix(Stream& stream, const HostMatrix& host)
      : integers_(host.bytes.size(), "integers"),
        groups_(host.groups.size(), "groups"),
        scale_(stream, DType::f32, host.scale) {
    DeviceBuffer from(host.bytes.size(), "a file"), groups_from(host.groups.size(), "a file");
    stream.upload(from.data(), host.bytes.data(), host.bytes.size());
    arrange_integers(stream, from.data(), host.nibbles, host.k, host.n, integers_.data());
    view_.integers = integers_.as<uint8_t>();
    if (host.nibbles) {
      stream.upload(groups_from.data(), host.groups.data(), host.groups.size());
      arrange_groups(stream, groups_from.data(), host.k, host.n, groups_.data());
      view_.groups = groups_.as<uint8_t>();
    }
    stream.wait();
    view_.scale = scale_.f32();
    view_.k = host.k;
    view_.n = host.n;
  }
  const QuantizedMatrix& view() const { return view_; }
  Dense layer() const { return {nullptr, nullptr, nullptr, view_.k, view_.n, view_}; }

 private:
  DeviceBuffer integers_, groups_;
  Array scale_;
  QuantizedMatrix view_;
};

// One-hot rows give single weights, to the last bit: each has its place and its value.
TEST(integers_are_exact) {
  const int k = 72, n = 37;
  for (bool nibbles : {false, true}) {
    HostMatrix host(k, n, nibbles);
    std::fill(host.scale.begin(), host.scale.end(), 1.0f);
    for (DType act : kFloats) {
      for (int m : {24, 72}) {
        std::vector<float> x(m * k, 0.0f);
        for (int r = 0; r < m; ++r) x[r * k + k - m + r] = 1;
        const auto got = in_every_schedule([&] {
          Stream stream;
          const DeviceMatrix w(stream, host);
          Array xs(stream, act, x), out(stream, DType::f32, m * n);
          dense(stream, nullptr, xs.data(), act, m, w.layer(), {Output::f32, out.data()});
          return out.get();
        });
        for (int r = 0; r < m; ++r) {
          for (int c = 0; c < n; ++c) {
            CHECK_EQ(got[r * n + c], static_cast<float>(host.integer[c * k + k - m + r]));
          }
        }
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

void check_dense(DType act, bool nibbles, const DenseCase& c) {
  const HostMatrix host(c.k, c.n, nibbles);
  const auto x = normals(c.m * c.k, 1, act), bias = normals(c.n, 1), before = normals(c.m * c.n, 1);
  const DType out_type = c.output == Output::act ? act : DType::f32;
  const auto got = in_every_schedule([&] {
    Stream stream;
    const DeviceMatrix w(stream, host);
    Array xs(stream, act, x), b(stream, DType::f32, bias), out(stream, out_type, c.m * c.n);
    if (c.output == Output::add) out.set(before);
    Dense layer = w.layer();
    if (c.biased) layer.bias = b.f32();
    dense(stream, nullptr, xs.data(), act, c.m, layer, {c.output, out.data(), c.activation});
    return out.get();
  });
  std::vector<double> expected, allowed;
  for (int r = 0; r < c.m; ++r) {
    for (int j = 0; j < c.n; ++j) {
      double sum = 0, size = 0;
      for (int i = 0; i < c.k; ++i) {
        const double product = double{x[r * c.k + i]} * host.integer[j * c.k + i] * host.scale[j];
        sum += product;
        size += std::abs(product);
      }
      double y = activated(c.biased ? sum + bias[j] : sum, c.activation);
      if (c.output == Output::add) y += before[r * c.n + j];
      expected.push_back(y);
      allowed.push_back(1e-6 * (size + 2) + epsilon(out_type) * std::abs(y));
    }
  }
  check_close(got, expected, allowed,
              std::string(nibbles ? "int4" : "int8") + " weights, " + std::to_string(c.m) +
                  " rows of " + name_of(act) + ", K " + std::to_string(c.k) + ", N " +
                  std::to_string(c.n));
}

TEST(dense_layers) {
  using ops::Activation;
  const DenseCase cases[] = {
      {1, 2632, 16, Activation::none, Output::act, true},  // more pieces than are ahead
      {1, 64, 96, Activation::none, Output::f32, false},
      {2, 264, 33, Activation::gelu_tanh, Output::act, true},
      {5, 8, 5, Activation::gelu_erf, Output::act, true},
      {8, 776, 20, Activation::none, Output::add, true},
      {9, 1160, 17, Activation::none, Output::add, true},
      {20, 136, 33, Activation::relu, Output::act, false},
      {32, 1096, 10, Activation::none, Output::f32, true},
      {33, 40, 70, Activation::none, Output::add, true},
      {65, 584, 67, Activation::silu, Output::act, false},
      {100, 296, 33, Activation::none, Output::f32, false},
      {130, 72, 140, Activation::gelu_tanh, Output::act, true},
      {200, 264, 113, Activation::none, Output::add, true},
  };
  for (DType act : kFloats) {
    for (bool nibbles : {false, true}) {
      for (const DenseCase& c : cases) {
        if (act == DType::f32 && c.m > 65) continue;  // one kernel for all numbers of rows
        check_dense(act, nibbles, c);
      }
    }
  }
}

// Up to 32 rows a row's result does not depend on the others; in products of more rows neither, and
// in float32 never.
TEST(dense_rows_are_alike_in_any_number) {
  const int k = 264, n = 37;
  for (bool nibbles : {false, true}) {
    const HostMatrix host(k, n, nibbles);
    for (DType act : kFloats) {
      const auto x = normals(200 * k, 1, act);
      auto row = [&](int skip, int m) {  // row 7, as row 7 - skip of m
        Stream stream;
        const DeviceMatrix w(stream, host);
        Array xs(stream, act, std::vector<float>(x.begin() + skip * k, x.begin() + (skip + m) * k));
        Array out(stream, DType::f32, m * n);
        dense(stream, nullptr, xs.data(), act, m, w.layer(), {Output::f32, out.data()});
        const std::vector<float> y = out.get();
        return std::vector<float>(y.begin() + (7 - skip) * n, y.begin() + (8 - skip) * n);
      };
      const auto few = row(7, 1);
      CHECK(row(6, 2) == few);
      for (int m : {8, 12, 32}) CHECK(row(0, m) == few);
      const auto many = row(0, 33);
      if (act == DType::f32) {
        CHECK(many == few);
        continue;
      }
      for (int m : {64, 128, 129, 193}) CHECK(row(0, m) == many);
      CHECK(row(5, 100) == many);
    }
  }
}

TEST(embedding) {
  for (bool nibbles : {false, true}) {
    for (int channels : {8, 72, 1600}) {
      const int vocab = 37, n_positions = 7;
      const HostMatrix host(channels, vocab, nibbles);
      const std::vector<int32_t> ids = {36, 0, 12, 12, 23}, positions = {0, 6, 2, 3, 1};
      for (DType act : kFloats) {
        const auto wpe = normals(n_positions * channels, 1, act);
        const auto x = in_every_schedule([&] {
          Stream stream;
          const DeviceMatrix wte(stream, host);
          Array b(stream, act, wpe), out(stream, DType::f32, 5 * channels);
          Integers i(stream, ids), p(stream, positions);
          Tokens tokens;
          tokens.ids = i.data();
          tokens.positions = p.data();
          tokens.count = 5;
          embed(stream, tokens, wte.view(), b.data(), act, out.f32());
          return out.get();
        });
        for (int t = 0; t < 5; ++t) {
          for (int c = 0; c < channels; ++c) {
            const double token = double{host.scale[ids[t]]} * host.integer[ids[t] * channels + c];
            const double expected = token + wpe[positions[t] * channels + c];
            CHECK(std::abs(x[t * channels + c] - expected) <= 1e-6);
          }
        }
      }
    }
  }
}

// A tiny checkpoint, quantised, and one of floats that has its weights.
struct QuantizedCheckpoint {
  QuantizedCheckpoint(ExecContext& ctx, const GPT2Config& config, bool nibbles) : source(config) {
    for (const auto& [name, tensor] : source.tensors) {
      const bool is_table = name == "wte.weight";
      if (tensor.shape.size() < 2 || name == "wpe.weight") {
        quantized[name] = floats[name] = tensor;
        continue;
      }
      ops::Weight w;
      w.data = tensor.data;
      w.layout = is_table ? ops::WeightLayout::out_in : ops::WeightLayout::in_out;
      w.in_features = tensor.shape[is_table ? 1 : 0];
      w.out_features = tensor.shape[is_table ? 0 : 1];
      const auto k = static_cast<int>(w.in_features), n = static_cast<int>(w.out_features);
      const int64_t tiles = (n + 15) / 16, inputs = (k + 63) / 64 * 64;
      auto& data = bytes.emplace_back(nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n));
      auto& group = bytes.emplace_back(nibbles ? ops::group_bytes(k, n) : 0);
      auto& scale = numbers.emplace_back(n);
      CHECK(ops::quantize(ctx, w, nullptr,
                          {data.data(), nibbles ? group.data() : nullptr, scale.data()}));
      const std::string base = name.substr(0, name.rfind('.'));
      const DType i8 = DType::i8;
      quantized[name] = {data.data(), data.size(), i8, {tiles, inputs / (nibbles ? 8 : 4), 16, 4}};
      quantized[base + ".scale"] = {scale.data(), scale.size() * 4, DType::f32, {n}};
      if (nibbles) {
        quantized[base + ".group"] = {group.data(), group.size(), i8, {tiles, inputs / 32, 16}};
      }
      const auto integer = integers_of(data.data(), nibbles ? group.data() : nullptr, k, n);
      auto& weights = numbers.emplace_back(size_t(k) * n);
      for (int c = 0; c < n; ++c) {
        for (int i = 0; i < k; ++i) {
          weights[is_table ? c * k + i : i * n + c] = scale[c] * float(integer[c * k + i]);
        }
      }
      floats[name] = {weights.data(), weights.size() * 4, DType::f32, tensor.shape};
    }
  }

  Checkpoint source;
  std::deque<std::vector<uint8_t>> bytes;
  std::deque<std::vector<float>> numbers;
  std::map<std::string, TensorView> quantized, floats;
};

// In float32 the model of the integers is that of the floats they stand for; the CPU's rounds what
// its layers read, and is near.
TEST(a_model_is_that_of_its_weights) {
  GPT2Config config;
  config.n_layer = 2;
  config.n_head = 3;
  config.n_embd = 48;
  config.n_inner = 72;
  config.n_positions = 64;
  config.vocab_size = 101;
  constexpr int kBlocks = 6;
  Context context{1};
  for (bool nibbles : {false, true}) {
    const QuantizedCheckpoint checkpoint(context.ctx, config, nibbles);
    const KVLayout layout{DType::f32, config.n_head, config.head_dim()};
    KVCache float_cache(config.n_layer, layout, kBlocks), cache(config.n_layer, layout, kBlocks);
    GPT2 floats(context.ctx, config, checkpoint.floats, DType::f32);
    GPT2 rounded(context.ctx, config, checkpoint.quantized, DType::f32);
    auto on_device = [&](DType act) {
      return DeviceGPT2(config, cuda::make_backend(config, checkpoint.quantized, act, act, kBlocks),
                        kBlocks);
    };
    DeviceGPT2 exact = on_device(DType::f32), half = on_device(DType::f16),
               brain = on_device(DType::bf16);
    const auto first = random_tokens(1, 50, 101), second = random_tokens(2, 30, 101);
    BatchBuilder prompts, next;  // many rows, then few
    prompts.add(first, 0, 49, {0, 1, 2, 3});
    prompts.add(second, 0, 20, {4, 5});
    next.add(first, 49, 50, {0, 1, 2, 3});
    next.add(second, 20, 22, {4, 5});
    for (const Batch& batch : {prompts.build(), next.build()}) {
      std::vector<int32_t> rows(batch.num_tokens());
      for (int32_t i = 0; i < batch.num_tokens(); ++i) rows[i] = i;
      const auto n = static_cast<int32_t>(rows.size());
      std::vector<float> expected(size_t(n) * config.vocab_size), got(expected.size());
      floats.forward(context.ctx, float_cache, batch, rows.data(), n, expected.data());
      auto check_near = [&](float allowed, const char* what) {
        float worst = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          CHECK(!std::isnan(got[i]));
          worst = std::max(worst, std::abs(got[i] - expected[i]));
        }
        std::printf("      %s: largest difference %g\n", what, worst);
        CHECK(worst < allowed);
      };
      exact.forward(batch, rows.data(), n, got.data());
      check_near(2e-4f, "float32");
      half.forward(batch, rows.data(), n, got.data());
      check_near(0.1f, "float16");  // of logits of about 10
      brain.forward(batch, rows.data(), n, got.data());
      check_near(1.0f, "bfloat16");
      rounded.forward(context.ctx, cache, batch, rows.data(), n, got.data());
      check_near(1.0f, "the CPU's");
    }
  }
}

TEST(what_is_no_quantised_checkpoint_is_refused) {
  GPT2Config config;
  config.n_layer = config.n_head = 1;
  config.n_embd = config.n_inner = 16;
  config.n_positions = config.vocab_size = 20;
  Context context{1};
  const QuantizedCheckpoint checkpoint(context.ctx, config, true);
  auto make = [&](const std::map<std::string, TensorView>& tensors) {
    return cuda::make_backend(config, tensors, DType::f32, DType::f32, 2);
  };
  auto changed = checkpoint.quantized;
  changed.erase("wte.group");  // of int8 then
  CHECK_THROWS(make(changed), CheckpointError, "'wte.weight' holds 1024 bytes of int8, but 2048");
  changed = checkpoint.quantized;
  changed.at("h.0.mlp.c_fc.group").bytes = 16;
  CHECK_THROWS(make(changed), CheckpointError, "h.0.mlp.c_fc.group");
  changed = checkpoint.quantized;
  changed.at("h.0.attn.c_proj.weight") = checkpoint.floats.at("h.0.attn.c_proj.weight");
  CHECK_THROWS(make(changed), CheckpointError, "bytes of integers are expected");
}

}  // namespace

// Quantized layers that hand on quantized rows give the bits of those that hand on float32, for
// every instruction set of this machine; quantizing gives the same bytes on all.
#include <cstring>
#include <random>

#include "check.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "cpu/dispatch.h"
#include "ops/ops.h"

namespace {

using namespace pyengine;

std::mt19937 rng(1);

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(n);
  for (float& v : values) v = distribution(rng);
  return values;
}

struct Matrix {
  AlignedBuffer data, group;
  std::vector<float> scale;
  ops::Weight weight;

  Matrix(ExecContext& ctx, const std::vector<float>& w, int64_t k, int64_t n, bool nibbles)
      : data(nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n)),
        group(nibbles ? ops::group_bytes(k, n) : 0),
        scale(n) {
    ops::Weight source;
    source.data = w.data();
    source.in_features = k;
    source.out_features = n;
    auto* packed = static_cast<uint8_t*>(data.data());
    auto* groups = nibbles ? static_cast<uint8_t*>(group.data()) : nullptr;
    CHECK(ops::quantize(ctx, source, nullptr, {packed, groups, scale.data()}));
    weight = source;
    weight.data = packed;
    weight.dtype = DType::i8;
    weight.layout = nibbles ? ops::WeightLayout::packed_nibbles : ops::WeightLayout::packed;
    weight.scale = scale.data();
    weight.group = groups;
  }
};

template <class T>
std::vector<T> bytes_of(const void* data, size_t bytes) {
  const T* first = static_cast<const T*>(data);
  return std::vector<T>(first, first + bytes / sizeof(T));  // nothing of nothing: data may be null
}

// layer norm, dense layer with an activation, dense layer: through float32, and quantized on the
// way.
void test_chain(ExecContext& ctx, int64_t rows, int64_t channels, int64_t inner, bool nibbles) {
  const std::vector<float> x = normal(rows * channels), gain = normal(channels);
  const std::vector<float> bias = normal(channels), inner_bias = normal(inner);
  Matrix up(ctx, normal(channels * inner), channels, inner, nibbles);
  Matrix down(ctx, normal(inner * channels), inner, channels, nibbles);
  const auto gelu = ops::Activation::gelu_tanh;

  std::vector<float> h(rows * channels), ff(rows * inner), expected(x), found(x);
  ops::layer_norm(ctx, x.data(), nullptr, rows, channels, gain.data(), bias.data(), 1e-5f, h.data(),
                  DType::f32);
  ops::linear(ctx, h.data(), rows, up.weight, inner_bias.data(), gelu, ff.data(), DType::f32);
  ops::linear_residual(ctx, ff.data(), rows, down.weight, bias.data(), expected.data());

  AlignedBuffer quantized_h(rows * ops::quantized_row_words(channels) * 4);
  AlignedBuffer quantized_ff(rows * ops::quantized_row_words(inner) * 4);
  ops::layer_norm(ctx, x.data(), nullptr, rows, channels, gain.data(), bias.data(), 1e-5f,
                  quantized_h.data(), DType::i8);
  up.weight.input = down.weight.input = DType::i8;
  ops::linear(ctx, quantized_h.data(), rows, up.weight, inner_bias.data(), gelu,
              quantized_ff.data(), DType::i8);
  ops::linear_residual(ctx, quantized_ff.data(), rows, down.weight, bias.data(), found.data());
  CHECK(std::memcmp(expected.data(), found.data(), expected.size() * sizeof(float)) == 0);
}

TEST(quantized_rows_are_those_that_would_be_made_later) {
  for (const std::string& isa : cpu::available_isas()) {
    for (int threads : {1, 3}) {
      ThreadPool pool(threads);
      Arena arena;
      ExecContext ctx{pool, arena, cpu::kernels_for(isa.c_str())};
      for (bool nibbles : {false, true}) {
        test_chain(ctx, 1, 64, 256, nibbles);
        test_chain(ctx, 3, 45, 7, nibbles);
        test_chain(ctx, 21, 100, 777, nibbles);
        test_chain(ctx, 70, 320, 1025, nibbles);
      }
    }
  }
}

TEST(the_same_bytes_on_every_instruction_set) {
  const int64_t k = 77, n = 40;
  const std::vector<float> w = normal(k * n);
  for (bool nibbles : {false, true}) {
    std::vector<uint8_t> data, group;
    for (const std::string& isa : cpu::available_isas()) {
      ThreadPool pool(2);
      Arena arena;
      ExecContext ctx{pool, arena, cpu::kernels_for(isa.c_str())};
      const Matrix matrix(ctx, w, k, n, nibbles);
      const auto packed = bytes_of<uint8_t>(matrix.data.data(), matrix.data.size());
      const auto groups = bytes_of<uint8_t>(matrix.group.data(), matrix.group.size());
      if (data.empty()) {
        data = packed;
        group = groups;
      }
      CHECK(packed == data);
      CHECK(groups == group);
    }
  }
}

}  // namespace

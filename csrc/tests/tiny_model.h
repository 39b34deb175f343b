// A model with random weights in memory, and batches built by hand, for tests of whole steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "model/gpt2.h"

namespace pyengine::test {

struct Context {
  explicit Context(int threads) : pool(threads), ctx{pool, arena, cpu::kernels_for(nullptr)} {}
  ThreadPool pool;
  Arena arena;
  ExecContext ctx;
};

inline SlotParams greedy(int32_t logprobs) {
  SlotParams params;
  params.temperature = 0;
  params.logprobs = logprobs;
  return params;
}

// Weights in memory, every parameter random.
struct Checkpoint {
  explicit Checkpoint(const GPT2Config& c) {
    add("wte.weight", {c.vocab_size, c.n_embd}, 0, 0.4f);
    add("wpe.weight", {c.n_positions, c.n_embd}, 0, 0.4f);
    for (int i = 0; i < c.n_layer; ++i) {
      const std::string h = "h." + std::to_string(i) + ".";
      norm(h + "ln_1", c.n_embd);
      conv1d(h + "attn.c_attn", c.n_embd, 3 * c.n_embd);
      conv1d(h + "attn.c_proj", c.n_embd, c.n_embd);
      norm(h + "ln_2", c.n_embd);
      conv1d(h + "mlp.c_fc", c.n_embd, c.n_inner);
      conv1d(h + "mlp.c_proj", c.n_inner, c.n_embd);
    }
    norm("ln_f", c.n_embd);
  }

  void norm(const std::string& name, int n) {
    add(name + ".weight", {n}, 1, 0.3f);
    add(name + ".bias", {n}, 0, 0.3f);
  }
  void conv1d(const std::string& name, int in, int out) {
    add(name + ".weight", {in, out}, 0, 2.0f / std::sqrt(static_cast<float>(in)));
    add(name + ".bias", {out}, 0, 0.3f);
  }
  void add(const std::string& name, const std::vector<int64_t>& shape, float mean,
           float deviation) {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    std::normal_distribution<float> normal(mean, deviation);
    storage.emplace_back(n);
    for (float& x : storage.back()) x = normal(random);
    tensors[name] = {storage.back().data(), n * sizeof(float), DType::f32, shape};
  }

  std::mt19937 random{7};
  std::vector<std::vector<float>> storage;
  std::map<std::string, TensorView> tensors;
};

inline std::vector<int32_t> random_tokens(uint32_t seed, int n, int vocab_size) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(random() % vocab_size);
  return tokens;
}

// Builds a batch of pieces: tokens [from, to) of sequences with given blocks.
struct BatchBuilder {
  std::vector<int32_t> ids, positions, starts{0}, lengths, copies;
  std::vector<std::vector<int32_t>> tables;

  void add(const std::vector<int32_t>& tokens, int from, int to,
           const std::vector<int32_t>& blocks) {
    for (int i = from; i < to; ++i) {
      ids.push_back(tokens[i]);
      positions.push_back(i);
    }
    starts.push_back(static_cast<int32_t>(ids.size()));
    lengths.push_back(to);
    tables.push_back(blocks);
  }
  Batch build() const {
    size_t width = 0;
    for (const auto& table : tables) width = std::max(width, table.size());
    std::vector<int32_t> flat;
    for (auto table : tables) {
      table.resize(width, 0);
      flat.insert(flat.end(), table.begin(), table.end());
    }
    return Batch(ids, positions, starts, lengths, flat, copies);
  }
};

}  // namespace pyengine::test

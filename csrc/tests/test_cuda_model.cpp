// The whole model on the simulator (test_cuda_model) or a GPU (test_gpu_model) against the CPU's:
// logits, greedy tokens under continuous batching, shared prefixes, copied blocks, and what is
// refused.
#include <cstdlib>

#include "core/errors.h"
#include "cuda/runtime.h"
#include "kv/block_manager.h"
#include "kv/kv_cache.h"
#include "model/device_gpt2.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace pyengine;        // NOLINT
using namespace pyengine::test;  // NOLINT

namespace {

const bool quick = std::getenv("PYENGINE_TEST_QUICK") != nullptr;  // for ThreadSanitizer

constexpr int32_t kBlocks = 24;

GPT2Config tiny() {
  GPT2Config c;
  c.n_layer = 2;
  c.n_head = 3;
  c.n_embd = 48;
  c.n_inner = 72;
  c.n_positions = 320;
  c.vocab_size = 101;
  return c;
}

// One checkpoint on both back ends.
struct Pair {
  explicit Pair(const GPT2Config& config = tiny(), DType act = DType::f32, DType kv = DType::f32)
      : checkpoint(config),
        cpu(context.ctx, config, checkpoint.tensors, DType::f32),
        cache(config.n_layer,
              {kv == DType::i8 ? DType::i8 : DType::f32, config.n_head, config.head_dim()},
              kBlocks),
        device(config, cuda::make_backend(config, checkpoint.tensors, act, kv, kBlocks), kBlocks) {}

  Context context{1};
  Checkpoint checkpoint;
  GPT2 cpu;
  KVCache cache;
  DeviceGPT2 device;
};

// The largest difference of the logits of all tokens of a batch.
float worst_logit(Pair& pair, const Batch& batch) {
  std::vector<int32_t> rows(batch.num_tokens());
  for (int32_t i = 0; i < batch.num_tokens(); ++i) rows[i] = batch.num_tokens() - 1 - i;
  const auto n = static_cast<int32_t>(rows.size());
  std::vector<float> a(static_cast<size_t>(n) * pair.cpu.config().vocab_size), b(a.size());
  pair.cpu.forward(pair.context.ctx, pair.cache, batch, rows.data(), n, a.data());
  pair.device.forward(batch, rows.data(), n, b.data());
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, std::abs(a[i] - b[i]));
    if (std::isnan(b[i])) return b[i];
  }
  return worst;
}

// Prompts in chunks, decode steps beside them, a shared prefix, a copied block.
float worst_of_a_conversation(Pair& pair) {
  const auto first = random_tokens(1, 300, 101), second = random_tokens(2, 90, 101);
  BlockManager manager(kBlocks, true);
  const auto a = manager.allocate(19);
  float worst = 0;
  auto run = [&](BatchBuilder& b) {
    const float w = worst_logit(pair, b.build());
    worst = w <= worst ? worst : w;
  };
  BatchBuilder prompt;
  prompt.add(first, 0, 70, a);
  run(prompt);
  auto shared = std::vector<int32_t>(a.begin(), a.begin() + 4);  // 64 tokens of the first
  manager.fork(shared);
  auto mixed = std::vector<int32_t>(first.begin(), first.begin() + 64);
  mixed.insert(mixed.end(), second.begin(), second.end());
  auto b_blocks = shared;
  for (int32_t block : manager.allocate(1)) b_blocks.push_back(block);
  for (int at = 70; at < 73; ++at) {
    BatchBuilder step;
    step.add(first, at, at + 1, a);
    if (at == 71) step.add(mixed, 64, 77, b_blocks);
    if (at == 72) step.add(mixed, 77, 78, b_blocks);
    run(step);
  }
  // The second goes on in a copy of its last block; the first jumps ahead past a segment of keys.
  BatchBuilder copied;
  auto c_blocks = b_blocks;
  c_blocks.back() = manager.allocate(1)[0];
  copied.copies = {b_blocks.back(), c_blocks.back()};
  copied.add(mixed, 78, 80, c_blocks);
  copied.add(first, 73, 290, a);
  run(copied);
  for (int at = 290; at < 292; ++at) {
    BatchBuilder step;
    step.add(first, at, at + 1, a);
    run(step);
  }
  // One token of a short context, then one of a long one: graphs of different numbers of segments,
  // in buffers that no longer grow.
  c_blocks.push_back(manager.allocate(1)[0]);
  BatchBuilder both, short_one, long_one;
  both.add(first, 292, 293, a);
  both.add(mixed, 80, 81, c_blocks);
  run(both);
  short_one.add(mixed, 81, 82, c_blocks);
  run(short_one);
  long_one.add(first, 293, 294, a);
  run(long_one);
  return worst;
}

TEST(logits_are_the_cpus) {
  Pair pair;
  CHECK(worst_of_a_conversation(pair) < 2e-4f);
  if (quick) return;
  GPT2Config other = tiny();
  other.activation = ops::Activation::gelu_erf;
  other.scale_attn_by_inverse_layer_idx = true;
  Pair second(other);
  CHECK(worst_of_a_conversation(second) < 2e-4f);
}

TEST(reduced_precision_is_near) {
  if (quick) return;
  Pair half(tiny(), DType::f16, DType::f16), brain(tiny(), DType::bf16, DType::bf16);
  const float half_worst = worst_of_a_conversation(half);
  CHECK(half_worst < 0.1f);  // logits of about 10
  const float brain_worst = worst_of_a_conversation(brain);
  CHECK(brain_worst < 1.0f);
  // A value at the edge of two integers may fall to the other one.
  Pair int8(tiny(), DType::f32, DType::i8);
  const float int8_worst = worst_of_a_conversation(int8);
  CHECK(int8_worst < 0.5f);
  std::printf("      largest differences: %g, %g, %g\n", half_worst, brain_worst, int8_worst);
}

// Three requests come and go, one is preempted and starts again with all its tokens.
template <class StepFunction>
std::vector<std::vector<int32_t>> greedy_tokens(StepFunction&& step) {
  Sampler sampler(3);
  BlockManager manager(kBlocks, false);
  std::vector<std::vector<int32_t>> tokens, blocks(3);
  for (int i = 0; i < 3; ++i) {
    tokens.push_back(random_tokens(20 + i, 5 + 30 * i, 101));
    sampler.set(i, greedy(i == 1 ? 3 : -1));
  }
  std::vector<size_t> done(3, 0);
  for (int round = 0; round < 14; ++round) {
    if (round == 6) {  // the preempted one
      manager.free(blocks[1]);
      blocks[1].clear();
      done[1] = 0;
    }
    BatchBuilder batch;
    std::vector<int32_t> slots, who;
    for (int i = 0; i < 3; ++i) {
      if (round < 2 * i) continue;  // not here yet
      const size_t end = std::min(tokens[i].size(), done[i] + 24);
      while (blocks[i].size() * kBlockTokens < end) blocks[i].push_back(manager.allocate(1)[0]);
      batch.add(tokens[i], static_cast<int>(done[i]), static_cast<int>(end), blocks[i]);
      done[i] = end;
      slots.push_back(end == tokens[i].size() ? i : -1);
      who.push_back(i);
    }
    StepResult result;
    step(sampler, batch.build(), slots.data(), result);
    size_t r = 0;
    for (size_t k = 0; k < slots.size(); ++k) {
      if (slots[k] >= 0) tokens[who[k]].push_back(result.token_ids[r++]);
    }
  }
  return tokens;
}

TEST(greedy_tokens_are_the_cpus) {
  Pair pair;
  const auto expected =
      greedy_tokens([&](Sampler& s, const Batch& b, const int32_t* slots, StepResult& r) {
        pair.cpu.step(pair.context.ctx, pair.cache, s, b, slots, r);
      });
#if defined(PYENGINE_CUDA_SIM)
  sim::options().seed = 1;
#endif
  const auto got =
      greedy_tokens([&](Sampler& s, const Batch& b, const int32_t* slots, StepResult& r) {
        pair.device.step(pair.context.ctx, s, b, slots, r);
      });
#if defined(PYENGINE_CUDA_SIM)
  sim::options() = sim::Options();
#endif
  CHECK(got == expected);
}

TEST(scores_are_the_cpus) {
  Pair pair;
  const auto tokens = random_tokens(5, 100, 101);
  BlockManager manager(kBlocks, false);
  BatchBuilder b;
  b.add(tokens, 0, 100, manager.allocate(7));
  std::vector<int32_t> rows(99);
  for (int i = 0; i < 99; ++i) rows[i] = i;
  const ScoredRows scored{rows.data(), tokens.data() + 1, 99, 3};
  const int32_t slot = -1;
  Sampler sampler(1);
  StepResult cpu, device;
  pair.cpu.step(pair.context.ctx, pair.cache, sampler, b.build(), &slot, cpu, scored);
  pair.device.step(pair.context.ctx, sampler, b.build(), &slot, device, scored);
  CHECK_EQ(device.scores.size(), 99u);
  for (int i = 0; i < 99; ++i) {
    CHECK(std::abs(cpu.scores[i] - device.scores[i]) < 2e-4f);
    CHECK_EQ(device.score_tops[i].size(), 3u);
    for (int k = 0; k < 3; ++k) {
      CHECK_EQ(device.score_tops[i][k].first, cpu.score_tops[i][k].first);
      CHECK(std::abs(cpu.score_tops[i][k].second - device.score_tops[i][k].second) < 2e-4f);
    }
  }
}

TEST(what_does_not_fit_is_refused) {
  auto make = [](const GPT2Config& config, DType act, DType kv, int32_t blocks) {
    const Checkpoint checkpoint(tiny());
    return cuda::make_backend(config, checkpoint.tensors, act, kv, blocks);
  };
  GPT2Config odd = tiny();
  odd.n_inner = 70;
  CHECK_THROWS(make(odd, DType::f32, DType::f32, 4), ConfigError, "n_inner is 70");
  odd = tiny();
  odd.n_head = 4;
  CHECK_THROWS(make(odd, DType::f32, DType::f32, 4), ConfigError, "multiple of 8");
  CHECK_THROWS(make(tiny(), DType::f32, DType::bf16, 4), ConfigError, "int8");
  odd = tiny();
  odd.n_layer = 3;
  CHECK_THROWS(make(odd, DType::f32, DType::f32, 4), CheckpointError, "h.2.ln_1.weight");
  CHECK_THROWS(make(tiny(), DType::f32, DType::f32, 1 << 30), OutOfMemory, "the KV cache takes");
#if defined(PYENGINE_CUDA_SIM)
  CHECK_EQ(sim::allocated_bytes(), 0u);
  sim::options().capability = 70;
  CHECK_THROWS(cuda::find_device(), ConfigError, "7.5 or higher");
  sim::options().capability = 75;
  CHECK_EQ(cuda::find_device().minor, 5);
  CHECK_THROWS(make(tiny(), DType::bf16, DType::bf16, 4), ConfigError, "no bfloat16 arithmetic");
  sim::options().driver = 12020;
  CHECK_THROWS(cuda::find_device(), ConfigError, "supports CUDA 12.2");
  sim::options().driver = 0;
  CHECK_THROWS(cuda::find_device(), ConfigError, "no NVIDIA driver");
  sim::options() = sim::Options();
#endif
  Pair pair;
  BatchBuilder b;
  b.add(random_tokens(1, 5, 101), 0, 5, {kBlocks});
  std::vector<float> logits(101);
  const int32_t row = 0;
  CHECK_THROWS(pair.device.forward(b.build(), &row, 1, logits.data()), RequestError,
               "does not exist");
  CHECK_THROWS(open_cuda_library("/nowhere/libpyengine_cuda.so"), ConfigError, "cannot be opened");
}

}  // namespace

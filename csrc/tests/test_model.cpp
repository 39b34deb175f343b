// A tiny random model through whole steps: what a request gets must not depend on batch, chunks or
// threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/errors.h"
#include "cpu/dispatch.h"
#include "kv/block_manager.h"
#include "model/gpt2.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace pyengine;        // NOLINT
using namespace pyengine::test;  // NOLINT

namespace {

GPT2Config tiny() {
  GPT2Config c;
  c.n_layer = 3;
  c.n_head = 3;
  c.n_embd = 30;
  c.n_inner = 70;
  c.n_positions = 160;
  c.vocab_size = 101;
  return c;
}

KVLayout layout_of(const GPT2Config& c, DType dtype) { return {dtype, c.n_head, c.head_dim()}; }

// Logits of every position of one sequence, computed alone in chunks of the given size.
std::vector<float> logits_alone(GPT2& model, Context& c, const std::vector<int32_t>& tokens,
                                int chunk, DType kv_dtype) {
  KVCache kv(model.config().n_layer, layout_of(model.config(), kv_dtype), 16);
  BlockManager manager(16, false);
  auto blocks = manager.allocate((static_cast<int64_t>(tokens.size()) + 15) / 16);
  std::vector<float> logits;
  for (int from = 0; from < static_cast<int>(tokens.size()); from += chunk) {
    int to = std::min(from + chunk, static_cast<int>(tokens.size()));
    BatchBuilder b;
    b.add(tokens, from, to, blocks);
    std::vector<int32_t> rows(to - from);
    for (int i = 0; i < to - from; ++i) rows[i] = i;
    size_t before = logits.size();
    logits.resize(before + rows.size() * model.config().vocab_size);
    model.forward(c.ctx, kv, b.build(), rows.data(), static_cast<int32_t>(rows.size()),
                  logits.data() + before);
  }
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST(chunks_and_threads_change_no_bit) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context one(1), three(3);
  for (DType dtype : {DType::f32, DType::bf16}) {
    GPT2 model(one.ctx, config, checkpoint.tensors, dtype);
    auto tokens = random_tokens(1, 150, config.vocab_size);
    auto whole = logits_alone(model, one, tokens, 150, dtype);
    CHECK(std::all_of(whole.begin(), whole.end(), [](float x) { return std::isfinite(x); }));
    for (int chunk : {1, 7, 16, 64, 149}) {
      CHECK(same_bits(logits_alone(model, three, tokens, chunk, dtype), whole));
    }
  }
}

TEST(neighbours_prefixes_and_copies_change_no_bit) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context c(2);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  const int vocab = config.vocab_size;
  auto a = random_tokens(1, 60, vocab), b = random_tokens(2, 33, vocab);
  auto fork = a;  // as `a` up to 40, then another text
  for (int i = 40; i < 60; ++i) fork[i] = b[i - 40];
  auto a_alone = logits_alone(model, c, a, 60, DType::f32);
  auto b_alone = logits_alone(model, c, b, 33, DType::f32);
  auto fork_alone = logits_alone(model, c, fork, 60, DType::f32);

  KVCache kv(config.n_layer, layout_of(config, DType::f32), 16);
  std::vector<int32_t> a_blocks{5, 3, 9, 1}, b_blocks{2, 8, 0}, fork_blocks{5, 3, 11, 12};
  std::vector<float> out(vocab);
  auto expect = [&](const Batch& batch, int32_t row, const std::vector<float>& all, int position) {
    model.forward(c.ctx, kv, batch, &row, 1, out.data());
    CHECK(std::memcmp(out.data(), all.data() + int64_t{position} * vocab, vocab * 4) == 0);
  };
  BatchBuilder first;  // the prompt of `a` beside the start of `b`
  first.add(a, 0, 40, a_blocks);
  first.add(b, 0, 10, b_blocks);
  expect(first.build(), 39, a_alone, 39);
  expect(first.build(), 49, b_alone, 9);
  BatchBuilder second;  // the fork shares two blocks, and half of the third is copied
  second.copies = {9, 11};
  second.add(b, 10, 33, b_blocks);
  second.add(fork, 40, 60, fork_blocks);
  second.add(a, 40, 41, a_blocks);
  expect(second.build(), 42, fork_alone, 59);
  expect(second.build(), 43, a_alone, 40);
  expect(second.build(), 22, b_alone, 32);
}

TEST(steps_sample_the_last_tokens_of_those_that_ask) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context c(2);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  auto a = random_tokens(1, 20, config.vocab_size), b = random_tokens(2, 9, config.vocab_size);
  KVCache kv(config.n_layer, layout_of(config, DType::f32), 8);
  Sampler sampler(4);
  sampler.set(3, greedy(2));
  BatchBuilder builder;
  builder.add(a, 0, 20, {4, 1});
  builder.add(b, 0, 9, {0});
  const Batch batch = builder.build();
  std::vector<int32_t> slots{-1, 3};
  StepResult result;
  model.step(c.ctx, kv, sampler, batch, slots.data(), result);
  CHECK_EQ(result.token_ids.size(), size_t{1});
  auto logits = logits_alone(model, c, b, 9, DType::f32);
  const float* last = logits.data() + 8 * config.vocab_size;
  CHECK_EQ(result.token_ids[0], std::max_element(last, last + config.vocab_size) - last);
  CHECK_EQ(result.top_logprobs[0][0].first, result.token_ids[0]);
  CHECK_EQ(result.top_logprobs[0][0].second, result.logprobs[0]);

  // Sampled and scored rows of one batch, the same row among them: one reduction.
  const std::vector<int32_t> rows{28, 3}, targets{result.token_ids[0], 7};
  StepResult both;
  model.step(c.ctx, kv, sampler, batch, slots.data(), both, {rows.data(), targets.data(), 2, 1});
  CHECK(both.token_ids == result.token_ids);
  CHECK_EQ(both.logprobs[0], result.logprobs[0]);
  CHECK_EQ(both.scores[0], result.logprobs[0]);
  CHECK_EQ(both.score_tops[0][0].first, result.token_ids[0]);
  const std::vector<int32_t> nobody{-1, -1};
  StepResult scored;
  model.step(c.ctx, kv, sampler, batch, nobody.data(), scored,
             {rows.data() + 1, targets.data() + 1, 1, 0});
  CHECK(scored.token_ids.empty());
  CHECK_EQ(scored.scores[0], both.scores[1]);

  slots = {-1, -1};
  model.step(c.ctx, kv, sampler, batch, slots.data(), result);
  CHECK(result.token_ids.empty());
}

// A model starts on the weights as they lie in the file and packs them from its second step on.
TEST(packing_changes_no_bit) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context c(2);
  auto tokens = random_tokens(6, 40, config.vocab_size);
  for (DType dtype : {DType::f32, DType::bf16}) {
    GPT2 model(c.ctx, config, checkpoint.tensors, dtype);
    CHECK_EQ(model.is_packed(), dtype == DType::bf16);  // converted, and packed with it
    auto first = logits_alone(model, c, tokens, 40, dtype);
    CHECK_EQ(model.is_packed(), dtype == DType::bf16);
    auto second = logits_alone(model, c, tokens, 40, dtype);
    CHECK(model.is_packed());
    CHECK(model.owned_bytes() > 0);
    CHECK(same_bits(first, second));
    CHECK(same_bits(first, logits_alone(model, c, tokens, 7, dtype)));
  }
}

TEST(weights_are_converted_and_checked) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context c(2);
  auto tokens = random_tokens(4, 30, config.vocab_size);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  size_t vectors = 0;
  for (const auto& [name, tensor] : checkpoint.tensors) {
    if (tensor.shape.size() == 1) vectors += tensor.bytes;
  }
  CHECK_EQ(model.owned_bytes(), vectors);
  auto plain = logits_alone(model, c, tokens, 30, DType::f32);

  // A file whose tensors lie at odd addresses gives the same numbers.
  std::vector<char> odd(1 + checkpoint.tensors["wte.weight"].bytes);
  auto shifted = checkpoint.tensors;
  std::memcpy(odd.data() + 1, shifted["wte.weight"].data, shifted["wte.weight"].bytes);
  shifted["wte.weight"].data = odd.data() + 1;
  GPT2 copied(c.ctx, config, shifted, DType::f32);
  CHECK_EQ(copied.owned_bytes(), vectors + shifted["wte.weight"].bytes);
  CHECK(same_bits(logits_alone(copied, c, tokens, 30, DType::f32), plain));

  // float16 weights are exact in float32: the model equals one of the rounded weights.
  Checkpoint rounded(config);
  std::vector<std::vector<uint16_t>> halves;
  auto half = rounded.tensors;
  for (auto& [name, tensor] : half) {
    const int64_t n = static_cast<int64_t>(tensor.bytes) / 4;
    halves.emplace_back(n);
    void* values = const_cast<void*>(tensor.data);
    ops::convert(c.ctx, values, DType::f32, halves.back().data(), DType::f16, n);
    ops::convert(c.ctx, halves.back().data(), DType::f16, values, DType::f32, n);
    tensor.data = halves.back().data();
    tensor.dtype = DType::f16;
    tensor.bytes = n * 2;
  }
  GPT2 from_half(c.ctx, config, half, DType::f32),
      from_rounded(c.ctx, config, rounded.tensors, DType::f32);
  CHECK(same_bits(logits_alone(from_half, c, tokens, 30, DType::f32),
                  logits_alone(from_rounded, c, tokens, 30, DType::f32)));

  auto broken = checkpoint.tensors;
  broken.erase("h.1.mlp.c_fc.bias");
  CHECK_THROWS(GPT2(c.ctx, config, broken, DType::f32), CheckpointError, "'h.1.mlp.c_fc.bias'");
  broken = checkpoint.tensors;
  broken["h.2.attn.c_proj.weight"].shape = {30, 29};
  CHECK_THROWS(GPT2(c.ctx, config, broken, DType::f32), CheckpointError, "(30, 29)");
  broken = checkpoint.tensors;
  broken["wpe.weight"].bytes -= 4;
  CHECK_THROWS(GPT2(c.ctx, config, broken, DType::f32), CheckpointError, "bytes");
  GPT2Config wrong = config;
  wrong.n_head = 4;
  CHECK_THROWS(GPT2(c.ctx, wrong, checkpoint.tensors, DType::f32), ConfigError, "n_embd");
  CHECK_THROWS(GPT2(c.ctx, config, checkpoint.tensors, DType::f16), ConfigError, "float16");
}

TEST(bad_batches_are_refused_before_memory_is_touched) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  Context c(1);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  KVCache kv(config.n_layer, layout_of(config, DType::f32), 8);
  using V = std::vector<int32_t>;
  CHECK_THROWS(Batch({}, {}, {0}, {}, {}, {}), RequestError, "no tokens");
  CHECK_THROWS(Batch({1}, {0, 1}, {0, 1}, {1}, {0}, {}), RequestError, "positions");
  CHECK_THROWS(Batch({1}, {0}, {0, 2}, {1}, {0}, {}), RequestError, "query_start");
  CHECK_THROWS(Batch({1, 2}, {0, 1}, {0, 2, 2}, {2, 1}, {0, 1}, {}), RequestError, "sequence 1");
  CHECK_THROWS(Batch({1, 2}, {0, 0}, {0, 5, 2}, {5, 1}, {0, 1}, {}), RequestError, "query_start");
  CHECK_THROWS(Batch({1}, {1}, {0, 1}, {1}, {0}, {}), RequestError, "position 1, expected 0");
  CHECK_THROWS(Batch({1}, {16}, {0, 1}, {17}, {0}, {}), RequestError, "17");
  CHECK_THROWS(Batch({1, 2}, {0, 1}, {0, 2}, {1}, {0}, {}), RequestError, "context_len is 1");
  CHECK_THROWS(Batch({1}, {0}, {0, 1}, {1}, {0}, {1}), RequestError, "odd number");
  CHECK_THROWS(Batch({1, 2}, {0, 0}, {0, 1, 2}, {1, 1}, {0, 1, 2}, {}), RequestError, "multiple");
  std::vector<float> out(config.vocab_size);
  auto forward = [&](const Batch& batch, int32_t row) {
    model.forward(c.ctx, kv, batch, &row, 1, out.data());
  };
  CHECK_THROWS(forward(Batch({101}, {0}, {0, 1}, {1}, {0}, {}), 0), RequestError, "token id 101");
  CHECK_THROWS(forward(Batch({-1}, {0}, {0, 1}, {1}, {0}, {}), 0), RequestError, "token id -1");
  CHECK_THROWS(forward(Batch({1}, {0}, {0, 1}, {1}, {8}, {}), 0), RequestError, "block 8");
  CHECK_THROWS(forward(Batch({1}, {0}, {0, 1}, {1}, {0}, {}), 1), RequestError, "row 1");
  CHECK_THROWS(forward(Batch({1}, {160}, {0, 1}, {161}, V(11, 0), {}), 0), RequestError,
               "160 positions");
  CHECK_THROWS(forward(Batch({1, 2}, {0, 0}, {0, 1, 2}, {1, 1}, {3, 3}, {}), 0), RequestError,
               "block 3");
  CHECK_THROWS(forward(Batch({1}, {0}, {0, 1}, {1}, {0}, {1, 2, 2, 3}), 0), RequestError,
               "both from and to");
  CHECK_THROWS(forward(Batch({1}, {0}, {0, 1}, {1}, {0}, {1, 2, 3, 2}), 0), RequestError, "twice");
  KVCache other(config.n_layer + 1, layout_of(config, DType::f32), 8);
  int32_t row = 0;
  CHECK_THROWS(
      model.forward(c.ctx, other, Batch({1}, {0}, {0, 1}, {1}, {0}, {}), &row, 1, out.data()),
      ConfigError, "KV cache");
}

TEST(numbers_that_are_none_mark_one_sequence) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  auto& wpe = checkpoint.storage[1];
  wpe[5 * config.n_embd + 3] = std::numeric_limits<float>::quiet_NaN();  // position 5
  Context c(2);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  KVCache kv(config.n_layer, layout_of(config, DType::f32), 8);
  Sampler sampler(3);
  for (int32_t slot = 0; slot < 3; ++slot) sampler.set(slot, greedy(1));
  const auto tokens = random_tokens(3, 6, config.vocab_size);
  auto step = [&](const std::vector<int>& lengths) {
    BatchBuilder builder;
    std::vector<int32_t> slots;
    for (size_t b = 0; b < lengths.size(); ++b) {
      builder.add(tokens, 0, lengths[b], {static_cast<int32_t>(b)});
      slots.push_back(static_cast<int32_t>(b));
    }
    StepResult result;
    model.step(c.ctx, kv, sampler, builder.build(), slots.data(), result);
    return result;
  };
  const StepResult good = step({5, 4}), result = step({5, 6, 4});
  CHECK(result.token_ids[0] >= 0);
  CHECK(result.token_ids ==
        (std::vector<int32_t>{good.token_ids[0], StepResult::kNotFinite, good.token_ids[1]}));
  CHECK_EQ(result.logprobs[2], good.logprobs[1]);
}

TEST(generated_and_scored_log_probabilities_are_the_same_bits) {
  GPT2Config config = tiny();
  config.vocab_size = 1000;  // three tiles of the reduction
  Checkpoint checkpoint(config);
  Context c(3);
  const int n = 40, top_n = 5;
  const auto tokens = random_tokens(5, n, config.vocab_size);
  for (DType dtype : {DType::f32, DType::bf16}) {
    GPT2 model(c.ctx, config, checkpoint.tensors, dtype);
    KVCache kv(config.n_layer, layout_of(config, dtype), 8);
    Sampler sampler(1);
    std::vector<int32_t> rows, targets;
    std::vector<float> stepped;
    std::vector<std::vector<std::pair<int32_t, float>>> stepped_tops;
    const int32_t slot = 0;
    for (int i = 0; i < n; ++i) {
      SlotParams params;
      params.temperature = 0.1f * static_cast<float>(i % 3);
      params.logprobs = top_n;
      sampler.set(0, params);
      BatchBuilder one;
      one.add(tokens, i, i + 1, {4, 1, 6});
      StepResult result;
      model.step(c.ctx, kv, sampler, one.build(), &slot, result);
      rows.push_back(i);
      targets.push_back(result.token_ids[0]);
      stepped.push_back(result.logprobs[0]);
      stepped_tops.push_back(result.top_logprobs[0]);
    }
    BatchBuilder all;
    all.add(tokens, 0, n, {0, 2, 3});
    StepResult result;
    const int32_t nobody = -1;
    model.step(c.ctx, kv, sampler, all.build(), &nobody, result,
               {rows.data(), targets.data(), n, top_n});
    CHECK(same_bits(result.scores, stepped));
    CHECK(result.score_tops == stepped_tops);
  }
}

TEST(scores_of_numbers_that_are_none_are_nan) {
  const GPT2Config config = tiny();
  Checkpoint checkpoint(config);
  checkpoint.storage[1][2 * config.n_embd] = std::numeric_limits<float>::quiet_NaN();  // position 2
  Context c(2);
  GPT2 model(c.ctx, config, checkpoint.tensors, DType::f32);
  KVCache kv(config.n_layer, layout_of(config, DType::f32), 8);
  BatchBuilder builder;
  builder.add(random_tokens(1, 2, config.vocab_size), 0, 2, {0});
  builder.add(random_tokens(2, 3, config.vocab_size), 0, 3, {1});
  const std::vector<int32_t> rows{0, 1, 2, 3, 4}, targets(5), nobody{-1, -1};
  Sampler sampler(1);
  StepResult result;
  model.step(c.ctx, kv, sampler, builder.build(), nobody.data(), result,
             {rows.data(), targets.data(), 5, 1});
  for (int row = 0; row < 5; ++row) {
    CHECK_EQ(std::isnan(result.scores[row]), row == 4);
    CHECK_EQ(result.score_tops[row][0].first >= 0, row != 4);
  }
}

TEST(heads_are_at_most_256_channels) {
  GPT2Config config = tiny();
  config.n_layer = 1;
  config.n_head = 1;
  config.n_inner = 8;
  for (int channels : {256, 257}) {
    config.n_embd = channels;
    Checkpoint checkpoint(config);
    Context c(2);
    if (channels > kMaxHeadDim) {
      CHECK_THROWS(GPT2(c.ctx, config, checkpoint.tensors, DType::f32), ConfigError,
                   "257 channels");
      CHECK_THROWS(KVCache(1, layout_of(config, DType::f32), 4), ConfigError, "head_dim is 257");
      const std::vector<float> q(channels);
      std::vector<float> out(channels), cache(16 * 2 * 272);
      const KVLayerView view{layout_of(config, DType::f32), cache.data(), 1};
      const Batch batch({1}, {0}, {0, 1}, {1}, {0}, {});
      CHECK_THROWS(
          ops::attention(c.ctx, q.data(), batch.view(), view, 1.0f, out.data(), DType::f32),
          ConfigError, "head_dim is 257");
      continue;
    }
    for (DType dtype : {DType::f32, DType::bf16}) {
      GPT2 model(c.ctx, config, checkpoint.tensors, dtype);
      const auto tokens = random_tokens(2, 40, config.vocab_size);
      const auto whole = logits_alone(model, c, tokens, 40, dtype);
      CHECK(std::all_of(whole.begin(), whole.end(), [](float x) { return std::isfinite(x); }));
      CHECK(same_bits(logits_alone(model, c, tokens, 7, dtype), whole));
    }
  }
}

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "cpu/dispatch.h"
#include "ops/ops.h"
#include "sampling/philox.h"
#include "sampling/row.h"
#include "sampling/sampler.h"
#include "tests/check.h"

using namespace pyengine;  // NOLINT

namespace {

struct Fixture {
  explicit Fixture(int threads) : pool(threads), ctx{pool, arena, cpu::kernels_for(nullptr)} {}
  ThreadPool pool;
  Arena arena;
  ExecContext ctx;
};

std::vector<float> random_logits(uint32_t seed, int n, float deviation) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> logits(n);
  for (float& x : logits) x = normal(random);
  return logits;
}

// The plain way: sort, cut, normalise, draw by the inverse of the distribution in the order of ids.
int32_t reference_choice(const std::vector<float>& logits, const SlotParams& p, double u) {
  const int n = static_cast<int>(logits.size());
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (p.temperature == 0) return order[0];
  int kept = n;
  if (p.top_k > 0 && p.top_k < n) {
    kept = p.top_k;
    while (kept < n && logits[order[kept]] == logits[order[p.top_k - 1]]) ++kept;
  }
  std::vector<double> weight(n, 0.0);
  double total = 0;
  for (int i = 0; i < kept; ++i) {
    weight[order[i]] = std::exp((logits[order[i]] - logits[order[0]]) / double(p.temperature));
    total += weight[order[i]];
  }
  double mass = 0;
  for (int i = 0; i < kept; ++i) {
    if (i > 0 && mass >= p.top_p * total) weight[order[i]] = 0;
    mass += weight[order[i]];
  }
  double sum = 0;
  for (double w : weight) sum += w;
  double running = 0;
  for (int id = 0; id < n; ++id) {
    running += weight[id];
    if (running > u * sum) return id;
  }
  return order[0];
}

}  // namespace

TEST(philox_known_answers) {
  // kat_vectors of the authors' Random123
  auto check = [](PhiloxCounter counter, PhiloxKey key, PhiloxCounter expected) {
    const PhiloxCounter got = philox4x32(counter, key);
    for (int i = 0; i < 4; ++i) CHECK_EQ(got.word[i], expected.word[i]);
  };
  constexpr uint32_t kAll = 0xffffffff;
  check({{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check({{kAll, kAll, kAll, kAll}}, {{kAll, kAll}},
        {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}},
        {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(exponential_is_accurate) {
  for (float x = 0; x > -87; x -= 0.0137f) {
    double exact = std::exp(static_cast<double>(x));
    CHECK(std::abs(sampling::exp_nonpositive(x) - exact) <= 2e-7 * exact);
  }
  CHECK_EQ(sampling::exp_nonpositive(0), 1.0f);
  CHECK_EQ(sampling::exp_nonpositive(-200), 0.0f);
  CHECK_EQ(sampling::exp_nonpositive(-std::numeric_limits<float>::infinity()), 0.0f);
}

TEST(passes_over_a_row_give_the_same_bits_on_every_instruction_set) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  struct Passes {
    std::vector<float> maxima, weights, sums, heavy, heavy_sums, kept, kept_sums;
    std::vector<double> above;
    std::vector<int32_t> between;
    bool numbers, with_nan;
  };
  for (int n : {1, 5, 16, 63, 64, 65, 100, 2047, 2050, 5003}) {
    for (float scale : {0.7f, 1.0f, 9.0f}) {
      std::vector<float> x = random_logits(static_cast<uint32_t>(n), n, 3.0f);
      for (int i = 1; i < n; i += 7) x[i] = -kInf;
      const float highest = *std::max_element(x.begin(), x.end());
      std::vector<Passes> all;
      for (const std::string& isa : cpu::available_isas()) {
        ThreadPool pool(1);
        Arena arena;
        const ExecContext ctx{pool, arena, cpu::kernels_for(isa.c_str())};
        const size_t blocks = (n + ops::kLogitBlock - 1) / ops::kLogitBlock;
        Passes p;
        p.maxima.resize(blocks);
        p.sums.resize(blocks);
        p.kept_sums.resize(blocks);
        p.weights.resize(n);
        p.above.resize(ops::kSumThresholds);
        p.numbers = ops::block_maxima(ctx, x.data(), n, p.maxima.data());
        ops::exp_weights(ctx, x.data(), p.maxima.data(), n, highest, scale, 0.0, p.weights.data(),
                         p.sums.data());
        p.heavy.resize(n);
        p.heavy_sums.resize(blocks);
        ops::exp_weights(ctx, x.data(), p.maxima.data(), n, highest, scale, 0.05, p.heavy.data(),
                         p.heavy_sums.data());
        const float thresholds[ops::kSumThresholds] = {0, 1e-4f, 0.1f, 1.0f};
        ops::sums_above(ctx, p.weights.data(), n, thresholds, p.above.data());
        p.kept = p.weights;
        ops::keep_above(ctx, p.kept.data(), n, 1e-3f, p.kept_sums.data());
        p.between.resize(n);
        p.between.resize(
            ops::select_between(ctx, p.weights.data(), n, 1e-4f, 0.5f, p.between.data()));
        std::vector<float> with_nan = x, maxima(blocks);
        with_nan[n / 2] = std::numeric_limits<float>::quiet_NaN();
        p.with_nan = ops::block_maxima(ctx, with_nan.data(), n, maxima.data());
        all.push_back(std::move(p));
      }
      for (int i = 0; i < n; ++i) {
        CHECK_EQ(all[0].weights[i], sampling::exp_nonpositive((x[i] - highest) * scale));
        CHECK_EQ(all[0].heavy[i], all[0].weights[i] >= 0.05 ? all[0].weights[i] : 0.0f);
      }
      for (const Passes& p : all) {
        CHECK(p.numbers && !p.with_nan);
        CHECK(p.maxima == all[0].maxima && p.weights == all[0].weights && p.sums == all[0].sums);
        CHECK(p.heavy == all[0].heavy && p.heavy_sums == all[0].heavy_sums);
        CHECK(p.above == all[0].above && p.between == all[0].between);
        CHECK(p.kept == all[0].kept && p.kept_sums == all[0].kept_sums);
      }
    }
  }
}

TEST(choices_equal_the_plain_algorithm) {
  Fixture f(2);
  Sampler sampler(1);
  int equal = 0, all = 0;
  for (int vocab : {1, 2, 17, 64, 65, 1000, 5003}) {
    for (int variant = 0; variant < 40; ++variant) {
      auto logits = random_logits(variant, vocab, 0.5f + variant % 7);
      if (variant % 3 == 0) {  // many ties
        for (float& x : logits) x = std::round(x);
      }
      if (variant % 5 == 0) {  // masked tokens
        for (int i = 0; i + 1 < vocab; i += 2) logits[i] = -std::numeric_limits<float>::infinity();
      }
      SlotParams p;
      p.temperature = variant % 8 == 0 ? 0.0f : 0.3f + 0.2f * (variant % 9);
      p.top_k = variant % 2 == 0 ? 0 : 1 + variant * variant;
      p.top_p = variant % 4 < 2 ? 1.0 : 0.02 * variant;
      p.seed = 0x123456789abcdef0u + variant;
      p.sample_index = variant % 3;
      sampler.set(0, p);
      for (int32_t position = 0; position < 10; ++position) {
        int32_t slot = 0;
        StepResult result;
        sampler.sample(f.ctx, logits.data(), 1, vocab, &slot, &position, result);
        double u = uniform(p.seed, position, p.sample_index);
        equal += result.token_ids[0] == reference_choice(logits, p, u);
        ++all;
      }
    }
  }
  // The two round sums differently, so a draw that falls on the edge between two tokens may differ.
  CHECK(equal >= all - 2);
}

TEST(rows_do_not_depend_on_threads_or_neighbours) {
  const int rows = 7, vocab = 3001;
  auto logits = random_logits(5, rows * vocab, 2.0f);
  std::vector<int32_t> slots(rows), positions(rows);
  Sampler sampler(rows);
  for (int r = 0; r < rows; ++r) {
    slots[r] = r;
    positions[r] = 100 + r;
    SlotParams p;
    p.top_k = r % 3 * 20;
    p.top_p = r % 2 == 0 ? 1.0 : 0.9;
    p.seed = r;
    p.logprobs = r - 1;
    sampler.set(r, p);
  }
  Fixture one(1), four(4);
  StepResult together, threaded;
  sampler.sample(one.ctx, logits.data(), rows, vocab, slots.data(), positions.data(), together);
  sampler.sample(four.ctx, logits.data(), rows, vocab, slots.data(), positions.data(), threaded);
  CHECK(together.token_ids == threaded.token_ids);
  CHECK(together.top_logprobs == threaded.top_logprobs);
  for (int r = 0; r < rows; ++r) {
    StepResult alone;
    sampler.sample(one.ctx, logits.data() + r * vocab, 1, vocab, &slots[r], &positions[r], alone);
    CHECK_EQ(alone.token_ids[0], together.token_ids[r]);
    CHECK_EQ(std::isnan(together.logprobs[r]), r == 0);
    if (r > 0) CHECK_EQ(alone.logprobs[0], together.logprobs[r]);
    CHECK_EQ(together.top_logprobs[r].size(), static_cast<size_t>(std::max(0, r - 1)));
  }
}

TEST(extreme_parameters_stay_in_range) {
  Fixture f(1);
  Sampler sampler(1);
  const int vocab = 130;
  for (float temperature : {1e-38f, 1e-5f, 1e5f, 3e38f}) {
    for (double top_p : {0.0, 1e-12, 0.5, 1.0 - 1e-9, 1.0}) {
      for (int32_t top_k : {0, 1, vocab - 1, vocab, 1 << 30}) {
        auto logits = random_logits(3, vocab, 50.0f);
        SlotParams p;
        p.temperature = temperature;
        p.top_p = top_p;
        p.top_k = top_k;
        p.logprobs = 1000;
        sampler.set(0, p);
        int32_t slot = 0, position = 1;
        StepResult result;
        sampler.sample(f.ctx, logits.data(), 1, vocab, &slot, &position, result);
        CHECK(result.token_ids[0] >= 0 && result.token_ids[0] < vocab);
        CHECK_EQ(result.top_logprobs[0].size(), size_t{vocab});
        auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (temperature < 1e-4f || top_p == 0 || top_k == 1) CHECK_EQ(result.token_ids[0], best);
      }
    }
  }
}

TEST(bad_logits_mark_their_row_alone) {
  Fixture f(2);
  Sampler sampler(5);
  SlotParams with_logprobs;
  with_logprobs.logprobs = 4;
  for (int32_t slot : {1, 2, 3}) sampler.set(slot, with_logprobs);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (float bad : {nan, -nan, inf}) {
    for (int at : {0, 63, 64, 199, 200}) {
      auto logits = random_logits(1, 3 * 201, 1.0f);
      const std::vector<int32_t> slots{1, 3, 2}, positions{9, 9, 9};
      StepResult good, result;
      sampler.sample(f.ctx, logits.data(), 3, 201, slots.data(), positions.data(), good);
      logits[201 + at] = bad;
      sampler.sample(f.ctx, logits.data(), 3, 201, slots.data(), positions.data(), result);
      CHECK_EQ(result.token_ids[1], StepResult::kNotFinite);
      CHECK(std::isnan(result.logprobs[1]));
      CHECK(result.top_logprobs[1].empty());
      for (int r : {0, 2}) {
        CHECK_EQ(result.token_ids[r], good.token_ids[r]);
        CHECK_EQ(result.logprobs[r], good.logprobs[r]);
        CHECK(result.top_logprobs[r] == good.top_logprobs[r]);
      }
    }
  }
  std::vector<float> masked(40, -inf);
  int32_t slot = 2, position = 0;
  StepResult result;
  sampler.sample(f.ctx, masked.data(), 1, 40, &slot, &position, result);
  CHECK_EQ(result.token_ids[0], StepResult::kNotFinite);
}

TEST(whole_tiles_of_masked_tokens_weigh_nothing) {
  Fixture f(1);
  Sampler sampler(1);
  SlotParams p;
  p.logprobs = 1;
  sampler.set(0, p);
  for (int at : {0, 500, 1199}) {
    std::vector<float> logits(1200, -std::numeric_limits<float>::infinity());
    logits[at] = 3.0f;
    int32_t slot = 0, position = 1;
    StepResult result;
    sampler.sample(f.ctx, logits.data(), 1, 1200, &slot, &position, result);
    CHECK_EQ(result.token_ids[0], at);
    CHECK_EQ(result.logprobs[0], 0.0f);
    CHECK_EQ(result.top_logprobs[0][0].second, 0.0f);
  }
}

TEST(edits_and_cuts_stay_within_the_row) {
  Fixture f(2);
  const int32_t vocab = 77, rows = 6;
  Sampler sampler(rows);
  const std::vector<int32_t> prompt{1, 2, 3, 76, 1, 2};
  for (int variant = 0; variant < 60; ++variant) {
    std::vector<int32_t> slots(rows), positions(rows, static_cast<int32_t>(prompt.size()));
    for (int32_t r = 0; r < rows; ++r) {
      SlotParams p;
      // Ids beyond the vocabulary: a tokenizer may know more tokens than the model.
      if (variant % 2 == 0) p.logit_bias = {{{76}, 3.0f}, {{1, 2, 5}, -1.0f}, {{900}, 1.0f}};
      if (variant % 3 == 0) p.allowed_token_ids = {0, 31, 32, 63, 64, 76, 500};
      p.repetition_penalty = 1.0f + 0.1f * static_cast<float>(variant % 4);
      p.presence_penalty = 0.5f * static_cast<float>(variant % 3);
      p.no_repeat_ngram_size = variant % 5;
      if (variant % 4 == 0) p.bad_words = {{2, 3}, {900}, {5}};
      p.min_tokens = variant % 2;
      p.stop_ids = {76, 900};
      if (variant % 7 > 3) p.min_p = 0.1;
      if (variant % 7 > 4) p.typical_p = 0.5;
      if (variant % 6 > 3) p.eta_cutoff = 0.01;
      if (variant % 6 > 4) p.epsilon_cutoff = 0.02;
      if (variant % 11 == 0) p.mirostat_tau = 3.0;
      p.seed = r;
      p.logprobs = r;
      SlotStart start;
      start.tokens = prompt.data();
      start.num_tokens = static_cast<int64_t>(prompt.size());
      start.num_prompt = 3;
      slots[r] = r;
      sampler.set(r, p, start);
      const std::vector<uint32_t> mask{~0u, 0u, 0x1ffu};
      if (r % 2 == 1) sampler.set_masks(r, mask.data(), 1, r == 1 ? 1 : 3);
    }
    for (int step = 0; step < 5; ++step) {
      auto logits = random_logits(variant * 10 + step, rows * vocab, 2.0f);
      const auto raw = logits;
      StepResult result;
      sampler.sample(f.ctx, logits.data(), rows, vocab, slots.data(), positions.data(), result);
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t token = result.token_ids[r];
        CHECK(token >= 0 && token < vocab);
        if (step == 0 && r == 1) CHECK(token < 32);
        CHECK_EQ(result.top_logprobs[r].size(), static_cast<size_t>(r));
        for (auto [id, logprob] : result.top_logprobs[r]) {
          if (id == token) CHECK_EQ(logprob, result.logprobs[r]);
        }
        ++positions[r];
      }
    }
  }
}

TEST(candidates_are_the_best_of_the_edited_log_probabilities) {
  const int32_t vocab = 203;
  const std::vector<int32_t> prompt{7, 3, 7, 3};
  Fixture one(1), four(4);
  for (int32_t count : {1, 2, 8, 203, 500}) {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      auto logits = random_logits(seed, 3 * vocab, 2.0f);
      logits[9] = logits[4] = 11.0f;  // a tie for the first place of row 0: the lower id goes first
      Sampler sampler(3);
      for (int32_t slot = 0; slot < 3; ++slot) {
        SlotParams p;
        p.num_candidates = slot == 2 ? 0 : count;  // row 2 draws as ever
        p.temperature = slot == 1 ? 0.0f : 0.3f;   // says nothing for candidates, nor does top_k
        p.top_k = 1;
        if (slot == 1) {
          p.repetition_penalty = 2.0f;
          p.bad_words = {{5}, {7, 3, 11}, {3, 12}};
          p.logit_bias = {{{20}, 5.0f}};
        }
        SlotStart start;
        start.tokens = prompt.data();
        start.num_tokens = start.num_prompt = static_cast<int64_t>(prompt.size());
        sampler.set(slot, p, start);
      }
      const auto raw = logits;
      const std::vector<int32_t> slots{0, 1, 2}, positions{4, 4, 4};
      StepResult result, threaded;
      sampler.sample(one.ctx, logits.data(), 3, vocab, slots.data(), positions.data(), result);
      for (int32_t r = 0; r < 2; ++r) {
        double total = 0;
        for (int32_t id = 0; id < vocab; ++id) total += std::exp(double(raw[r * vocab + id]));
        std::vector<std::pair<double, int32_t>> expected;  // (-score, id)
        for (int32_t id = 0; id < vocab; ++id) {
          double score = raw[r * vocab + id] - std::log(total);
          if (r == 1) {
            if (id == 5 || id == 11 || id == 12) continue;
            if (id == 3 || id == 7) score *= score < 0 ? 2 : 0.5;  // log-probabilities are edited
            if (id == 20) score += 5;
          }
          expected.emplace_back(-score, id);
        }
        std::sort(expected.begin(), expected.end());
        expected.resize(std::min<size_t>(expected.size(), count));
        const std::vector<BeamCandidate>& listed = result.candidates[r];
        CHECK_EQ(listed.size(), expected.size());
        for (size_t i = 0; i < listed.size(); ++i) {
          CHECK(std::abs(listed[i].score + expected[i].first) < 1e-4);
          CHECK(i == 0 || listed[i - 1].score > listed[i].score ||
                (listed[i - 1].score == listed[i].score && listed[i - 1].id < listed[i].id));
          const double own = raw[r * vocab + listed[i].id] - std::log(total);
          CHECK(std::abs(listed[i].logprob - own) < 1e-4);
        }
        CHECK_EQ(result.token_ids[r], listed[0].id);
      }
      CHECK_EQ(result.candidates[0][0].id, 4);
      CHECK(result.candidates[2].empty());
      logits = raw;
      sampler.sample(four.ctx, logits.data(), 3, vocab, slots.data(), positions.data(), threaded);
      for (int32_t r = 0; r < 2; ++r) {
        CHECK_EQ(threaded.candidates[r].size(), result.candidates[r].size());
        for (size_t i = 0; i < result.candidates[r].size(); ++i) {
          CHECK_EQ(threaded.candidates[r][i].id, result.candidates[r][i].id);
          CHECK_EQ(threaded.candidates[r][i].score, result.candidates[r][i].score);
        }
      }
    }
  }
}

TEST(candidates_of_rows_that_have_none) {
  Fixture f(1);
  const int32_t vocab = 40;
  Sampler sampler(2);
  SlotParams p;
  p.num_candidates = 6;
  p.allowed_token_ids = {30, 31};
  sampler.set(0, p);
  sampler.set(1, p);
  const uint32_t none[2] = {0, 0};
  sampler.set_masks(1, none, 1, 2);
  auto logits = random_logits(2, 3 * vocab, 1.0f);
  logits[2 * vocab + 3] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<int32_t> slots{0, 1, 0}, positions{5, 5, 5};
  for (int32_t first : {0, 1, 2}) {
    auto row =
        std::vector<float>(logits.begin() + first * vocab, logits.begin() + (first + 1) * vocab);
    StepResult result;
    if (first == 1) sampler.set_masks(1, none, 1, 2);
    sampler.sample(f.ctx, row.data(), 1, vocab, &slots[first], &positions[first], result);
    CHECK_EQ(result.candidates[0].size(), static_cast<size_t>(first == 0 ? 2 : 0));
    if (first == 1) CHECK_EQ(result.token_ids[0], StepResult::kNoneLeft);
    if (first == 2) CHECK_EQ(result.token_ids[0], StepResult::kNotFinite);
  }
}

TEST(parameters_are_checked) {
  Sampler sampler(2);
  auto with = [](auto change) {
    SlotParams p;
    change(p);
    return p;
  };
  CHECK_THROWS(sampler.set(2, SlotParams{}), RequestError, "slot 2");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.temperature = -1; })), RequestError,
               "temperature");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.temperature = NAN; })), RequestError,
               "temperature");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.top_k = -1; })), RequestError, "top_k");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.top_p = 1.5; })), RequestError, "top_p");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.logprobs = -2; })), RequestError, "logprobs");
  CHECK_THROWS(sampler.set(0, with([](auto& p) { p.num_candidates = -1; })), RequestError,
               "num_candidates");
}

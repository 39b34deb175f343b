// The device's sampler against the CPU's: the same logits, and a request's tokens, its
// log-probabilities and its state must be the same, for every control, in every schedule.
#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "cpu/dispatch.h"
#include "cuda/sampling.h"
#include "sampling/sampler.h"
#include "tests/cuda_results.h"

namespace {

using namespace pyengine;
using namespace pyengine::test;

constexpr float kInf = std::numeric_limits<float>::infinity();
const bool quick = std::getenv("PYENGINE_TEST_QUICK") != nullptr;  // for ThreadSanitizer

struct Cpu {
  ThreadPool pool{1};
  Arena arena;
  ExecContext ctx{pool, arena, cpu::kernels_for(nullptr)};
};

struct Step {
  std::vector<float> logits;  // (R, V)
  int32_t vocab_size;
  std::vector<int32_t> slots, positions, drafts;  // drafts (R,), or none
  const int32_t* draft_data() const { return drafts.empty() ? nullptr : drafts.data(); }
};

// Tokens are drawn by one of these.
using Sample = std::function<StepResult(Sampler&, const Step&)>;

StepResult on_cpu(Sampler& sampler, const Step& step) {
  static Cpu cpu;
  StepResult result;
  std::vector<float> logits = step.logits;
  sampler.sample(cpu.ctx, logits.data(), static_cast<int64_t>(step.slots.size()), step.vocab_size,
                 step.slots.data(), step.positions.data(), result, step.draft_data());
  return result;
}

// In pieces of two rows and more, as rows that follow others allow.
StepResult on_device(Sampler& sampler, const Step& step) {
  const auto n = static_cast<int32_t>(step.slots.size());
  const int64_t vocab = step.vocab_size;
  cuda::Stream stream;
  cuda::RowSampler rows;
  sampling::SamplingPlan plan;
  sampler.plan(n, step.vocab_size, step.slots.data(), step.positions.data(), step.draft_data(),
               plan);
  rows.start(stream, plan, n, step.vocab_size);
  std::vector<cuda::DeviceBuffer> pieces;
  for (int32_t first = 0, end; first < n; first = end) {
    end = std::min(first + 2 + first % 3, n);
    while (end < n && plan.rows[end].draft >= 0) ++end;
    const size_t values = static_cast<size_t>(end - first) * vocab;
    pieces.emplace_back((values + cuda::kLogitPadding) * 4, "logits");
    stream.upload(pieces.back().data(), step.logits.data() + first * vocab, values * 4);
    rows.run(stream, pieces.back().as<float>(), first, end - first);
  }
  rows.finish(stream, plan);
  StepResult result;
  sampler.conclude(n, step.vocab_size, step.slots.data(), step.positions.data(), step.draft_data(),
                   plan, result);
  return result;
}

// All of a result; numbers that are not there are -1000.
void append(const StepResult& result, std::vector<float>& out) {
  auto add = [&](double x) { out.push_back(std::isnan(x) ? -1000.0f : static_cast<float>(x)); };
  for (size_t r = 0; r < result.token_ids.size(); ++r) {
    add(result.token_ids[r]);
    add(result.logprobs[r]);
    add(static_cast<double>(result.top_logprobs[r].size()));
    for (const auto& [id, logprob] : result.top_logprobs[r]) {
      add(id);
      add(logprob);
    }
    if (!result.mirostat_mu.empty()) add(result.mirostat_mu[r]);
    if (result.candidates.empty()) continue;
    add(static_cast<double>(result.candidates[r].size()));
    for (const BeamCandidate& c : result.candidates[r]) {
      add(c.id);
      add(c.score);
      add(c.logprob);
    }
  }
}

// What `run` reports of the sampler that it is given must be the same on both.
void check_same(const std::function<std::vector<float>(const Sample&)>& run,
                const std::string& what) {
  const std::vector<float> expected = run(on_cpu);
  const std::vector<float> got = in_every_schedule([&] { return run(on_device); });
  CHECK_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= 2e-5f || got[i] == expected[i]) continue;
    fail(__FILE__, __LINE__,
         what + ": number " + std::to_string(i) + " is " + std::to_string(got[i]) +
             ", on the CPU " + std::to_string(expected[i]));
  }
}

struct Control {
  const char* name;
  std::function<void(SlotParams&)> set;
};

// The first five tokens are a prompt whose last two came before.
const std::vector<int32_t> kPrompt = {3, 1, 4, 3, 1, 5, 2, 3, 1};
constexpr int32_t kFirst = 5;

const std::vector<Control>& controls() {
  static const std::vector<Control> all = {
      {"greedy", [](SlotParams& p) { p.temperature = 0; }},
      {"temperature", [](SlotParams& p) { p.temperature = 0.7f; }},
      {"high temperature", [](SlotParams& p) { p.temperature = 1e30f; }},
      {"low temperature", [](SlotParams& p) { p.temperature = 1e-30f; }},
      {"top_k", [](SlotParams& p) { p.top_k = 4; }},
      {"top_k 1", [](SlotParams& p) { p.top_k = 1; }},
      {"top_k of most", [](SlotParams& p) { p.top_k = 900; }},
      {"top_p", [](SlotParams& p) { p.top_p = 0.8; }},
      {"top_p 0", [](SlotParams& p) { p.top_p = 0; }},
      {"top_p of nearly all", [](SlotParams& p) { p.top_p = 0.999, p.temperature = 2; }},
      {"top_k and top_p", [](SlotParams& p) { p.top_k = 30, p.top_p = 0.7; }},
      {"min_p", [](SlotParams& p) { p.min_p = 0.1; }},
      {"top_p and min_p", [](SlotParams& p) { p.top_p = 0.95, p.min_p = 0.02; }},
      {"typical_p", [](SlotParams& p) { p.typical_p = 0.5, p.temperature = 1.5f; }},
      {"typical_p of most", [](SlotParams& p) { p.typical_p = 0.95; }},
      {"epsilon", [](SlotParams& p) { p.epsilon_cutoff = 0.01; }},
      {"eta", [](SlotParams& p) { p.eta_cutoff = 0.02, p.temperature = 1.3f; }},
      {"typical, then epsilon", [](SlotParams& p) { p.typical_p = 0.3, p.epsilon_cutoff = 0.3; }},
      {"mirostat", [](SlotParams& p) { p.mirostat_tau = 2.5, p.mirostat_eta = 0.3; }},
      {"all cuts",
       [](SlotParams& p) {
         p.top_k = 60, p.top_p = 0.95, p.min_p = 0.001, p.typical_p = 0.9;
         p.epsilon_cutoff = 1e-4, p.eta_cutoff = 1e-3, p.temperature = 1.2f;
       }},
      {"logit_bias",
       [](SlotParams& p) {
         p.temperature = 0;
         p.logit_bias = {
             {{2}, 3.5f}, {{0}, -kInf}, {{2}, 4.25f}, {{3, 1, 6}, 9.0f}, {{4, 5}, 90.0f}};
       }},
      {"allowed_token_ids", [](SlotParams& p) { p.allowed_token_ids = {0, 3, 6}; }},
      {"repetition_penalty", [](SlotParams& p) { p.repetition_penalty = 1.7f, p.temperature = 0; }},
      {"frequency and presence",
       [](SlotParams& p) { p.frequency_penalty = 0.8f, p.presence_penalty = -1.1f; }},
      {"no_repeat_ngram_size", [](SlotParams& p) { p.no_repeat_ngram_size = 2, p.top_k = 6; }},
      {"bad_words", [](SlotParams& p) { p.bad_words = {{5}, {1, 2}, {1, 4}, {900000}}; }},
      {"min_tokens", [](SlotParams& p) { p.min_tokens = 2, p.stop_ids = {0, 1, 2, 3, 70000}; }},
      {"logprobs 0", [](SlotParams& p) { p.logprobs = 0; }},
      {"logprobs", [](SlotParams& p) { p.logprobs = 5, p.temperature = 0; }},
      {"many logprobs", [](SlotParams& p) { p.logprobs = 700; }},
      {"replay", [](SlotParams& p) { p.replay = {6, 2}, p.logprobs = 1; }},
      {"candidates", [](SlotParams& p) { p.num_candidates = 6, p.logprobs = 2; }},
      {"edited candidates",
       [](SlotParams& p) {
         p.num_candidates = 8, p.repetition_penalty = 1.3f, p.allowed_token_ids = {1, 2, 3, 5, 6};
         p.bad_words = {{2}};
       }},
      {"everything",
       [](SlotParams& p) {
         p.logit_bias = {{{1}, 2.0f}, {{6}, -1.0f}};
         p.repetition_penalty = 1.2f, p.frequency_penalty = 0.3f, p.presence_penalty = 0.1f;
         p.no_repeat_ngram_size = 3, p.bad_words = {{4}}, p.min_tokens = 1, p.stop_ids = {2};
         p.temperature = 0.9f, p.top_k = 50, p.top_p = 0.9, p.min_p = 1e-3, p.typical_p = 0.95;
         p.epsilon_cutoff = 3e-4, p.eta_cutoff = 1e-3, p.logprobs = 3;
       }},
  };
  return all;
}

// N(0, 3); `ties`: rounded so that many are equal.
std::vector<float> logits_of(uint32_t seed, size_t n, bool ties) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(-30, 3);
  std::vector<float> x(n);
  for (float& v : x) v = ties ? std::round(normal(random) / 2) * 2 : normal(random);
  return x;
}

// A slot for each control, and some steps of all of them.
std::vector<float> all_controls(const Sample& sample, int32_t vocab_size, bool ties, int steps) {
  const auto n = static_cast<int32_t>(controls().size());
  Sampler sampler(n);
  Step step;
  step.vocab_size = vocab_size;
  auto set = [&](int32_t i, int64_t num_tokens) {
    SlotParams p;
    p.seed = 11;
    p.sample_index = i;
    controls()[i].set(p);
    SlotStart start;
    start.tokens = kPrompt.data();
    start.num_tokens = num_tokens;
    start.num_prompt = num_tokens - 1;
    sampler.set(i, p, start);
    return p.num_candidates > 0;
  };
  std::vector<int32_t> beams;
  for (int32_t i = 0; i < n; ++i) {
    if (set(i, kFirst)) beams.push_back(i);
    step.slots.push_back(i);
    step.positions.push_back(kFirst);
  }
  std::vector<float> all;
  for (int s = 0; s < steps; ++s) {
    step.logits = logits_of(100 * s + vocab_size, static_cast<size_t>(n) * vocab_size, ties);
    // A grammar: for every other slot, a mask of the first tokens.
    const std::vector<uint32_t> mask(static_cast<size_t>(vocab_size + 95) / 64, 0xfffffff7u);
    for (int32_t i = s; i < n; i += 2) sampler.set_masks(i, mask.data(), 1, mask.size());
    append(sample(sampler, step), all);
    for (int32_t& position : step.positions) ++position;
    for (int32_t i : beams) set(i, kFirst + s + 1);  // which go on as the caller says
  }
  return all;
}

TEST(every_control_is_the_cpus) {
  for (int32_t vocab_size : {7, 101, 2050}) {
    for (bool ties : {false, true}) {
      const bool many = vocab_size > 101;
      if ((quick || many) && (ties || (quick && many))) continue;
      const int steps = many ? 1 : 3;
      check_same(
          [&](const Sample& sample) { return all_controls(sample, vocab_size, ties, steps); },
          std::to_string(vocab_size) + (ties ? " logits with ties" : " logits"));
    }
  }
}

// One row's logits, drawn from by many slots with other random numbers.
std::vector<float> many_draws(const Sample& sample, const std::vector<float>& logits, int32_t n,
                              const std::function<void(SlotParams&)>& set) {
  Sampler sampler(n);
  Step step;
  step.vocab_size = static_cast<int32_t>(logits.size());
  for (int32_t i = 0; i < n; ++i) {
    SlotParams p;
    p.seed = 5;
    p.sample_index = i;
    set(p);
    SlotStart start;
    start.tokens = kPrompt.data();
    start.num_tokens = start.num_prompt = i % 7;
    sampler.set(i, p, start);
    step.slots.push_back(i);
    step.positions.push_back(i % 7);
    step.logits.insert(step.logits.end(), logits.begin(), logits.end());
  }
  std::vector<float> all;
  append(sample(sampler, step), all);
  return all;
}

TEST(draws_follow_the_cpus) {
  if (quick) return;
  const auto logits = logits_of(1, 1021, false);
  for (const Control& control : controls()) {
    SlotParams p;
    control.set(p);
    if (p.temperature == 0 || p.num_candidates > 0) continue;
    check_same([&](const Sample& sample) { return many_draws(sample, logits, 5, control.set); },
               control.name);
  }
}

TEST(equal_logits_are_told_apart_by_id) {
  if (quick) return;
  // More equals than are compared one by one, alone and behind a better token.
  std::vector<float> logits(2600, 1.25f);
  auto check = [&](const std::function<void(SlotParams&)>& set) {
    check_same([&](const Sample& sample) { return many_draws(sample, logits, 2, set); }, "equals");
  };
  for (bool one_is_better : {false, true}) {
    if (one_is_better) logits[1999] = 4;
    check([](SlotParams& p) { p.temperature = 0, p.logprobs = 600; });
    check([](SlotParams& p) { p.top_p = 0.37; });
    check([](SlotParams& p) { p.top_k = 3, p.top_p = 0.6; });
    check([](SlotParams& p) { p.typical_p = 0.4; });
  }
  for (size_t i = 0; i < logits.size(); ++i) {  // two crowds, and extremes
    logits[i] = i % 3 == 0 ? 3e38f : i % 3 == 1 ? -3e38f : -kInf;
  }
  check([](SlotParams& p) { p.top_k = 1200, p.logprobs = 900; });
  check([](SlotParams& p) { p.top_p = 0.5; });
}

TEST(a_whole_vocabulary) {
  if (quick) return;
  const int32_t vocab_size = 50257;
  const auto& everything = controls().back().set;
  const auto logits = logits_of(3, vocab_size, false);
  check_same([&](const Sample& sample) { return many_draws(sample, logits, 2, everything); },
             "everything");
  check_same(
      [&](const Sample& sample) {
        return many_draws(sample, logits, 1, [](SlotParams& p) {
          p.top_p = 0.95, p.logprobs = 20, p.temperature = 1.1f;
        });
      },
      "top_p");
}

TEST(rows_without_a_token) {
  const int32_t vocab_size = 70;
  auto run = [&](const Sample& sample) {
    Sampler sampler(7);
    SlotParams p;
    p.logprobs = 2;
    p.top_p = 0.9;
    for (int32_t i = 0; i < 7; ++i) sampler.set(i, p);
    p.allowed_token_ids = {100, 101};
    sampler.set(4, p);
    p.num_candidates = 3;
    sampler.set(5, p);
    p.num_candidates = 0;
    p.allowed_token_ids = {};
    p.logit_bias = {{{3}, 3e38f}};
    sampler.set(6, p);
    const uint32_t none = 0;
    sampler.set_masks(3, &none, 1, 1);
    Step step;
    step.vocab_size = vocab_size;
    step.logits = logits_of(1, 7 * vocab_size, false);
    step.logits[1 * vocab_size - 1] = std::numeric_limits<float>::quiet_NaN();
    step.logits[1 * vocab_size + 13] = kInf;
    std::fill_n(step.logits.begin() + 2 * vocab_size, vocab_size, -kInf);
    step.logits[6 * vocab_size + 3] = 3e38f;
    step.slots = {0, 1, 2, 3, 4, 5, 6};
    step.positions = {1, 1, 1, 1, 1, 1, 1};
    std::vector<float> all;
    append(sample(sampler, step), all);
    return all;
  };
  check_same(run, "rows without a token");
  const auto got = run(on_device);
  CHECK_EQ(got[0], float{StepResult::kNotFinite});
}

// Groups of rows: a token and drafts, some of them right.
TEST(drafts_are_verified) {
  const int32_t vocab_size = 33;
  auto run = [&](const Sample& sample) {
    Sampler sampler(4);
    std::vector<int32_t> length(4, static_cast<int32_t>(kPrompt.size()));
    for (int32_t i = 0; i < 4; ++i) {
      SlotParams p;
      p.seed = i;
      p.temperature = i == 0 ? 0 : 0.6f;
      p.logprobs = i == 1 ? 2 : -1;
      p.repetition_penalty = i == 1 || i == 3 ? 1.4f : 1.0f;
      p.frequency_penalty = i == 3 ? 0.7f : 0.0f;
      p.no_repeat_ngram_size = i == 1 ? 2 : 0;
      if (i >= 2) p.mirostat_tau = 1.5;
      SlotStart start;
      start.tokens = kPrompt.data();
      start.num_tokens = start.num_prompt = length[i];
      sampler.set(i, p, start);
    }
    std::vector<float> all;
    int accepted = 0;
    for (int s = 0; s < 6; ++s) {
      Step step;
      step.vocab_size = vocab_size;
      // What the greedy one would say, which the others say often.
      const auto base = logits_of(1000 + s, static_cast<size_t>(5) * vocab_size, false);
      for (int32_t i = 0; i < 4; ++i) {
        for (int32_t k = 0; k < 5; ++k) {
          const auto row = base.begin() + int64_t{k} * vocab_size;
          step.slots.push_back(i);
          step.positions.push_back(length[i] + k);
          const auto before = k == 0 ? row : row - vocab_size;
          const auto best = std::max_element(before, before + vocab_size) - before;
          const bool wrong = (s + i) % 5 == k;
          step.drafts.push_back(k == 0 ? -1 : static_cast<int32_t>(wrong ? (best + 1) % 33 : best));
          step.logits.insert(step.logits.end(), row, row + vocab_size);
        }
        if (i == 2) {
          std::vector<uint32_t> masks(10, 0xffffffffu);
          masks[4] = 0xff00ffffu;
          sampler.set_masks(i, masks.data(), 5, 2);
        }
      }
      const StepResult result = sample(sampler, step);
      for (int r = 0; r < 20; ++r) {
        const bool is_token = result.token_ids[r] != StepResult::kSkipped;
        length[r / 5] += is_token;
        accepted += is_token && r % 5 > 0;
      }
      append(result, all);
    }
    CHECK(accepted > 12);
    return all;
  };
  check_same(run, "drafts");
}

}  // namespace

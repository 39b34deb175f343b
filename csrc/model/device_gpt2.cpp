#include "model/device_gpt2.h"

#include <dlfcn.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "core/errors.h"
#include "sampling/row.h"

namespace pyengine {

namespace {

// Rows of logits that are on the host at once: 64 of GPT-2's are 13 MB.
constexpr int32_t kPiece = 64;

// Rows in another order.
void rearrange(SampledRows& sampled, const std::vector<int32_t>& order) {
  for (auto* values : {&sampled.rows, &sampled.slots, &sampled.positions, &sampled.drafts}) {
    const std::vector<int32_t> before = *values;
    for (size_t i = 0; i < order.size(); ++i) (*values)[i] = before[order[i]];
  }
}

struct SampledView {
  SampledView(const SampledRows& sampled, int32_t begin, int32_t end, bool drafted)
      : count(end - begin),
        slots(sampled.slots.data() + begin),
        positions(sampled.positions.data() + begin),
        drafts(drafted ? sampled.drafts.data() + begin : nullptr) {}
  int32_t count;
  const int32_t *slots, *positions, *drafts;
};

// Moves the rows of a part of a step to their places among all `num_rows` of it.
void place_rows(StepResult& part, const int32_t* places, int32_t num_rows, StepResult& all) {
  all.token_ids.resize(num_rows);
  all.logprobs.resize(num_rows);
  all.top_logprobs.resize(num_rows);
  if (!part.mirostat_mu.empty()) {
    all.mirostat_mu.resize(num_rows, std::numeric_limits<double>::quiet_NaN());
  }
  if (!part.candidates.empty()) all.candidates.resize(num_rows);
  for (size_t i = 0; i < part.token_ids.size(); ++i) {
    const int32_t r = places[i];
    all.token_ids[r] = part.token_ids[i];
    all.logprobs[r] = part.logprobs[i];
    all.top_logprobs[r] = std::move(part.top_logprobs[i]);
    if (!part.mirostat_mu.empty()) all.mirostat_mu[r] = part.mirostat_mu[i];
    if (!part.candidates.empty()) all.candidates[r] = std::move(part.candidates[i]);
  }
}

}  // namespace

const cuda::Library& open_cuda_library(const std::string& path) {
  static const cuda::Library* library = nullptr;
  static std::string opened;
  if (library != nullptr && opened == path) return *library;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw ConfigError(std::string("device=\"cuda\": the CUDA back end cannot be opened: ") +
                      dlerror());
  }
  using Entry = const cuda::Library* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, "pyengine_cuda_library"));
  const cuda::Library* found = entry != nullptr ? entry() : nullptr;
  const cuda::Library mine;
  if (found == nullptr || found->bytes != mine.bytes || found->config_bytes != mine.config_bytes ||
      found->batch_bytes != mine.batch_bytes || found->tensor_bytes != mine.tensor_bytes ||
      found->plan_bytes != mine.plan_bytes) {
    dlclose(handle);
    throw ConfigError("device=\"cuda\": " + path +
                      " belongs to another build of pyengine; install pyengine again");
  }
  library = found;
  opened = path;
  return *library;
}

void DeviceGPT2::run(const Batch& batch, const int32_t* rows, int32_t num_rows) {
  batch.require_tokens(config_.vocab_size, config_.n_positions);
  batch.require_blocks(num_blocks_, block_marks_);
  backend_->run(batch.view(), batch.block_copies(), batch.num_copies(), rows, num_rows);
}

void DeviceGPT2::step(ExecContext& ctx, Sampler& sampler, const Batch& batch,
                      const int32_t* request_slot, StepResult& result, const ScoredRows& scored,
                      const int32_t* num_drafts) {
  require_scored(config_, batch, scored);
  sampled_.choose(sampler, batch, request_slot, num_drafts);
  const auto num_sampled = static_cast<int32_t>(sampled_.rows.size());
  order_.resize(num_sampled);
  std::iota(order_.begin(), order_.end(), 0);
  const auto first_on_host = std::stable_partition(order_.begin(), order_.end(), [&](int32_t r) {
    return !sampler.needs_logits(sampled_.slots[r]);
  });
  const auto num_on_device = static_cast<int32_t>(first_on_host - order_.begin());
  rearrange(sampled_, order_);
  rows_ = sampled_.rows;
  rows_.insert(rows_.end(), scored.rows, scored.rows + scored.num_rows);
  run(batch, rows_.data(), static_cast<int32_t>(rows_.size()));

  const bool drafted = num_drafts != nullptr;
  const SampledView on_device(sampled_, 0, num_on_device, drafted);
  sampler.plan(on_device.count, config_.vocab_size, on_device.slots, on_device.positions,
               on_device.drafts, plan_);
  if (num_on_device > 0) backend_->sample(plan_);
  StepResult part;
  sampler.conclude(on_device.count, config_.vocab_size, on_device.slots, on_device.positions,
                   on_device.drafts, plan_, num_on_device < num_sampled ? part : result);
  if (num_on_device < num_sampled) {
    result = StepResult();
    place_rows(part, order_.data(), num_sampled, result);
    const SampledView on_host(sampled_, num_on_device, num_sampled, drafted);
    float* logits = backend_->logits(num_on_device, on_host.count);
    sampler.sample(ctx, logits, on_host.count, config_.vocab_size, on_host.slots, on_host.positions,
                   part, on_host.drafts);
    place_rows(part, order_.data() + num_on_device, num_sampled, result);
  }
  score(ctx, num_sampled, scored, result);
}

void DeviceGPT2::score(ExecContext& ctx, int32_t first, const ScoredRows& scored,
                       StepResult& result) {
  const int32_t vocab = config_.vocab_size;
  result.scores.resize(scored.num_rows);
  result.score_tops.assign(scored.num_rows, {});
  piece_rows_.resize(kPiece);
  std::iota(piece_rows_.begin(), piece_rows_.end(), 0);
  log_totals_.resize(kPiece);
  sampling::Row row;
  std::vector<sampling::Candidate> best;
  for (int32_t begin = 0; begin < scored.num_rows; begin += kPiece) {
    const int32_t n = std::min(kPiece, scored.num_rows - begin);
    const float* logits = backend_->logits(first + begin, n);
    ops::log_sum_exp(ctx, logits, vocab, piece_rows_.data(), n, log_totals_.data());
    for (int32_t i = 0; i < n; ++i) {
      const float* x = logits + int64_t{i} * vocab;
      auto logprob = [&](float logit) { return static_cast<float>(logit - log_totals_[i]); };
      result.scores[begin + i] = logprob(x[scored.targets[begin + i]]);
      if (scored.top_n == 0) continue;
      auto& tops = result.score_tops[begin + i];
      if (!row.load(ctx, x, vocab)) {
        tops.assign(scored.top_n, {-1, std::numeric_limits<float>::quiet_NaN()});
        continue;
      }
      row.select_top_k(scored.top_n, best);
      std::partial_sort(best.begin(), best.begin() + scored.top_n, best.end(), sampling::better);
      for (int32_t k = 0; k < scored.top_n; ++k) {
        tops.emplace_back(best[k].id, logprob(best[k].logit));
      }
    }
  }
}

void DeviceGPT2::forward(const Batch& batch, const int32_t* rows, int32_t num_rows, float* logits) {
  require_rows(batch, rows, num_rows);
  run(batch, rows, num_rows);
  for (int32_t begin = 0; begin < num_rows; begin += kPiece) {
    const int32_t n = std::min(kPiece, num_rows - begin);
    const float* piece = backend_->logits(begin, n);
    std::copy_n(piece, int64_t{n} * config_.vocab_size,
                logits + int64_t{begin} * config_.vocab_size);
  }
}

}  // namespace pyengine

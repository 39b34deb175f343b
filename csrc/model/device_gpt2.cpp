#include "model/device_gpt2.h"

#include <dlfcn.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/errors.h"
#include "sampling/row.h"

namespace pyengine {

namespace {

// Rows of logits that are on the host at once: 64 of GPT-2's are 13 MB.
constexpr int32_t kPiece = 64;

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
      found->batch_bytes != mine.batch_bytes || found->tensor_bytes != mine.tensor_bytes) {
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
  rows_ = sampled_.rows;
  const auto num_sampled = static_cast<int32_t>(rows_.size());
  rows_.insert(rows_.end(), scored.rows, scored.rows + scored.num_rows);
  run(batch, rows_.data(), static_cast<int32_t>(rows_.size()));
  float* logits = num_sampled > 0 ? backend_->logits(0, num_sampled) : nullptr;
  sampler.sample(ctx, logits, num_sampled, config_.vocab_size, sampled_.slots.data(),
                 sampled_.positions.data(), result,
                 num_drafts == nullptr ? nullptr : sampled_.drafts.data());
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

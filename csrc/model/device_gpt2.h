// GPT-2 on a device of its own: the same step as GPT2's, with the forward pass and the sampler of a
// back end. Logits come to the host where a caller's processor wants them, and to be scored.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/backend.h"
#include "model/batch.h"
#include "model/gpt2.h"
#include "sampling/sampler.h"

namespace pyengine {

// Opens the shared library of the CUDA back end, once. Throws ConfigError, saying how to get one.
const cuda::Library& open_cuda_library(const std::string& path);

class DeviceGPT2 {
 public:
  // `num_blocks` of the KV cache, which the back end owns.
  DeviceGPT2(const GPT2Config& config, std::unique_ptr<cuda::Backend> backend, int32_t num_blocks)
      : config_(config), backend_(std::move(backend)), num_blocks_(num_blocks) {}

  const GPT2Config& config() const { return config_; }
  const cuda::BackendDevice& device() const { return backend_->device(); }
  int32_t num_blocks() const { return num_blocks_; }

  // As GPT2's. `ctx` is what the sampler runs on.
  void step(ExecContext& ctx, Sampler& sampler, const Batch& batch, const int32_t* request_slot,
            StepResult& result, const ScoredRows& scored = {}, const int32_t* num_drafts = nullptr);
  void forward(const Batch& batch, const int32_t* rows, int32_t num_rows, float* logits);

 private:
  void run(const Batch& batch, const int32_t* rows, int32_t num_rows);
  // `first`: which of the last run's rows is the first of the scored ones.
  void score(ExecContext& ctx, int32_t first, const ScoredRows& scored, StepResult& result);

  GPT2Config config_;
  std::unique_ptr<cuda::Backend> backend_;
  int32_t num_blocks_;
  SampledRows sampled_;
  std::vector<int32_t> order_;  // (R,) which sampled row comes when: on the host the last ones
  sampling::SamplingPlan plan_;
  std::vector<int32_t> rows_, piece_rows_;
  std::vector<double> log_totals_;
  std::vector<uint8_t> block_marks_;
};

}  // namespace pyengine

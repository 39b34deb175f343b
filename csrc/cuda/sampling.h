// The device's sampler: plans of csrc/sampling/plan.h over rows of logits that lie on the device.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "cuda/runtime.h"
#include "sampling/plan.h"

namespace pyengine::cuda {

// What is known of a part of a row. Infinite: a logit is NaN or infinite.
struct LogitStats {
  float raw_max, raw_min;  // of the model's logits; the least one that is not -infinity
  float raw_sum;           // of exp(logit - raw_max), if the row is scored
  float max, min;          // after the edits
};

// A plan on the device.
struct SamplingArrays {
  const sampling::RowPlan* rows = nullptr;
  const sampling::TokenBias* biases = nullptr;
  const sampling::TokenCount* penalties = nullptr;
  const uint32_t* masks = nullptr;
  sampling::RowOutcome* outcomes = nullptr;
  sampling::ListedToken* listed = nullptr;
};

// Logits that are readable beyond those of a step's rows, as they are read four at a time.
constexpr int64_t kLogitPadding = 4;

// Numbers from one row of edited logits to the next: room for three that a row may begin after a
// multiple of 16 bytes, and for three behind its end.
PYENGINE_BOTH constexpr int64_t edited_stride(int64_t vocab_size) {
  return (vocab_size + 6) / 4 * 4;
}

// Statistics of one row of logits.
int64_t logit_stats_of(int64_t vocab_size);

// Some rows of logits (count, V), at multiples of 16 bytes, and kLogitPadding more; their plans.
struct LogitRows {
  const float* logits = nullptr;
  float* edited = nullptr;      // (count, edited_stride(V)), of rows that are edited
  LogitStats* stats = nullptr;  // (count, logit_stats_of(V))
  int32_t count = 0, vocab_size = 0;
  const sampling::RowPlan* plans = nullptr;
};

// Sets stats and edited. Rows that list candidates are edited by a second call.
void scan_logits(Stream& stream, const LogitRows& rows, const SamplingArrays& arrays, bool second);

// From these to tokens; outcomes (count,).
void choose_tokens(Stream& stream, const LogitRows& rows, sampling::RowOutcome* outcomes,
                   sampling::ListedToken* listed);

// Memory of the above, grown to the largest step.
class RowSampler {
 public:
  // Uploads a plan, to be run by pieces of up to most_rows.
  void start(Stream& stream, const sampling::SamplingPlan& plan, int32_t most_rows,
             int32_t vocab_size);
  void run(Stream& stream, const float* logits, int32_t first, int32_t num_rows);
  // Waits for the outcomes.
  void finish(Stream& stream, sampling::SamplingPlan& plan);

 private:
  PinnedBuffer host_plan_, host_outcome_;
  DeviceBuffer device_plan_, device_outcome_, edited_, stats_;
  SamplingArrays arrays_;
  size_t outcome_bytes_ = 0, listed_at_ = 0;
  bool has_candidates_ = false;
  int32_t vocab_size_ = 0;
};

}  // namespace pyengine::cuda

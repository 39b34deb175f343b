// Sampling on the device: the edits of the logits, and what it takes to go from a plan of the
// host's to outcomes. What parameters mean stands in csrc/sampling/definitions.h, and is compiled
// into both samplers. A row of logits is gone over by several blocks once, for its statistics and
// edits (scan), and then by one block as often as its parameters want (choose.cu).
#include <algorithm>
#include <cstring>

#include "cuda/sampling.cuh"
#include "cuda/sampling.h"
#include "sampling/definitions.h"

namespace pyengine::cuda {

namespace {

using sampling::kForbidden;
using sampling::ListedToken;
using sampling::RowOutcome;
using sampling::RowPlan;
using sampling::TokenBias;
using sampling::TokenCount;

constexpr int kScanThreads = 256;
constexpr int kChunk = 2048;  // logits of a block, 8 of each thread

// A chunk of a row: statistics of its logits, which are edited into `edited`. Edits of a token are
// made one after the other by one thread. Rows that list candidates are edited as
// log-probabilities, for which all chunks' statistics have to be there: in a second launch.
// Budget of scan_kernel: 256 threads, 64 registers, 8240 bytes shared; LDG.128
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(LogitRows rows, SamplingArrays arrays, bool second) {
  PYENGINE_SHARED(tile, float[kChunk]);
  PYENGINE_SHARED(scratch, float[kScanThreads / 32]);
  PYENGINE_SHARED(log_total, double);
  start_after_previous();
  const int64_t r = blockIdx.y;
  const RowPlan& plan = rows.plans[r];
  const int vocab_size = rows.vocab_size;
  if (second && plan.num_candidates == 0) return;
  const int chunk = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const float* row = rows.logits + r * vocab_size;
  const int first = chunk * kChunk - shift_of(row);  // the token of tile[0]
  LogitStats* row_stats = rows.stats + r * gridDim.x;
  LogitStats& stats = row_stats[chunk];
  auto exists = [&](int at) { return first + at >= 0 && first + at < vocab_size; };

  float v[2][4];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int at = (k * kScanThreads + thread) * 4;
    float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + at < vocab_size) four = *reinterpret_cast<const float4*>(row + first + at);
    v[k][0] = four.x, v[k][1] = four.y, v[k][2] = four.z, v[k][3] = four.w;
  }
  // The largest and the least of the chunk's values.
  auto find_range = [&](float& max, float& min) {
    float high = -INFINITY, low = INFINITY;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!exists((k * kScanThreads + thread) * 4 + i)) continue;
        const float x = v[k][i];
        high = fmaxf(high, x < INFINITY ? x : INFINITY);  // of NaN, too
        if (x > -INFINITY) low = fminf(low, x);
      }
    }
    max = block_max(high, scratch);
    min = -block_max(-low, scratch);
  };

  if (!second) {
    float max, min, sum = 0;
    find_range(max, min);
    if (plan.is_scored && max > -INFINITY && max < INFINITY) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (exists((k * kScanThreads + thread) * 4 + i)) {
            sum += sampling::exp_nonpositive(v[k][i] - max);
          }
        }
      }
      sum = block_sum(sum, scratch);
    }
    if (thread == 0) stats = {max, min, sum, max, min};
  }
  if (!plan.is_edited || second != (plan.num_candidates > 0)) return;

  if (second) {
    const double total = log_total_of(row_stats, static_cast<int>(gridDim.x), &log_total);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[k][i] = static_cast<float>(v[k][i] - total);
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    *reinterpret_cast<float4*>(&tile[(k * kScanThreads + thread) * 4]) = {v[k][0], v[k][1], v[k][2],
                                                                          v[k][3]};
  }
  __syncthreads();
  const TokenBias* const row_biases = arrays.biases + plan.first_bias;
  for (int e = thread; e < plan.num_biases; e += kScanThreads) {
    const int id = row_biases[e].id, at = id - first;
    if (at < 0 || at >= kChunk || (e > 0 && row_biases[e - 1].id == id)) continue;
    float x = tile[at];
    for (int i = e; i < plan.num_biases && row_biases[i].id == id; ++i) {
      x = sampling::biased(x, row_biases[i].bias);
    }
    tile[at] = x;
  }
  __syncthreads();
  const TokenCount* const row_penalties = arrays.penalties + plan.first_penalty;
  for (int e = thread; e < plan.num_penalties; e += kScanThreads) {
    const int at = row_penalties[e].id - first;
    if (at < 0 || at >= kChunk) continue;
    tile[at] = sampling::penalized(tile[at], plan.repetition_penalty, plan.presence_penalty,
                                   plan.frequency_penalty, row_penalties[e].num_new);
  }
  __syncthreads();
  const uint32_t* const mask =
      plan.first_mask_word < 0 ? nullptr : arrays.masks + plan.first_mask_word;
  float* const out = edited_row(rows, r) + first;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int at = (k * kScanThreads + thread) * 4;
    const float4 four = *reinterpret_cast<const float4*>(&tile[at]);
    v[k][0] = four.x, v[k][1] = four.y, v[k][2] = four.z, v[k][3] = four.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int id = first + at + i;
      if (mask != nullptr && exists(at + i) && (mask[id / 32] >> id % 32 & 1) == 0) {
        v[k][i] = kForbidden;
      }
    }
    if (first + at < vocab_size) {
      *reinterpret_cast<float4*>(out + at) = {v[k][0], v[k][1], v[k][2], v[k][3]};
    }
  }
  float max, min;
  find_range(max, min);
  if (thread == 0) {
    stats.max = max;
    stats.min = min;
  }
}

// Memory of at least so many bytes; its contents are lost.
template <class Buffer, class... What>
void reserve(Buffer& buffer, size_t bytes, What... what) {
  if (buffer.size() >= bytes) return;
  buffer = Buffer();
  buffer = Buffer(bytes, what...);
}

}  // namespace

int64_t logit_stats_of(int64_t vocab_size) {
  return (vocab_size + 3 + kChunk - 1) / kChunk;  // 3: rows that begin inside of 16 bytes
}

void scan_logits(Stream& stream, const LogitRows& rows, const SamplingArrays& arrays, bool second) {
  const dim3 grid(static_cast<unsigned>(logit_stats_of(rows.vocab_size)),
                  static_cast<unsigned>(rows.count));
  launch("scan", stream, scan_kernel, grid, kScanThreads, 0, rows, arrays, second);
}

void RowSampler::start(Stream& stream, const sampling::SamplingPlan& plan, int32_t most_rows,
                       int32_t vocab_size) {
  size_t used = 0;
  auto place = [&](const auto& array) {  // at a multiple of 16 bytes
    const size_t at = used;
    used += (array.size() * sizeof(array[0]) + 15) / 16 * 16;
    return at;
  };
  const size_t rows = place(plan.rows), biases = place(plan.biases),
               penalties = place(plan.penalties), masks = place(plan.masks);
  reserve(host_plan_, used);
  reserve(device_plan_, used, "the parameters of sampling");
  auto write = [&](const auto& array, size_t at) {
    if (!array.empty()) {
      std::memcpy(host_plan_.bytes() + at, array.data(), array.size() * sizeof(array[0]));
    }
  };
  write(plan.rows, rows);
  write(plan.biases, biases);
  write(plan.penalties, penalties);
  write(plan.masks, masks);
  stream.upload(device_plan_.data(), host_plan_.data(), used);
  arrays_.rows = reinterpret_cast<const RowPlan*>(device_plan_.bytes() + rows);
  arrays_.biases = reinterpret_cast<const TokenBias*>(device_plan_.bytes() + biases);
  arrays_.penalties = reinterpret_cast<const TokenCount*>(device_plan_.bytes() + penalties);
  arrays_.masks = reinterpret_cast<const uint32_t*>(device_plan_.bytes() + masks);

  used = 0;
  place(plan.outcomes);
  listed_at_ = place(plan.listed);
  outcome_bytes_ = used;
  reserve(host_outcome_, used);
  reserve(device_outcome_, used, "sampled tokens");
  arrays_.outcomes = device_outcome_.as<RowOutcome>();
  arrays_.listed = reinterpret_cast<ListedToken*>(device_outcome_.bytes() + listed_at_);
  reserve(edited_, most_rows * edited_stride(vocab_size) * sizeof(float), "edited logits");
  reserve(stats_, most_rows * logit_stats_of(vocab_size) * sizeof(LogitStats), "logit statistics");
  vocab_size_ = vocab_size;
  has_candidates_ = std::any_of(plan.rows.begin(), plan.rows.end(),
                                [](const RowPlan& row) { return row.num_candidates > 0; });
}

void RowSampler::run(Stream& stream, const float* logits, int32_t first, int32_t num_rows) {
  const LogitRows rows{logits,   edited_.as<float>(), stats_.as<LogitStats>(),
                       num_rows, vocab_size_,         arrays_.rows + first};
  scan_logits(stream, rows, arrays_, false);
  if (has_candidates_) scan_logits(stream, rows, arrays_, true);
  choose_tokens(stream, rows, arrays_.outcomes + first, arrays_.listed);
}

void RowSampler::finish(Stream& stream, sampling::SamplingPlan& plan) {
  stream.download(host_outcome_.data(), device_outcome_.data(), outcome_bytes_);
  stream.wait();
  std::memcpy(plan.outcomes.data(), host_outcome_.data(),
              plan.outcomes.size() * sizeof(RowOutcome));
  if (plan.listed.empty()) return;
  std::memcpy(plan.listed.data(), host_outcome_.bytes() + listed_at_,
              plan.listed.size() * sizeof(ListedToken));
}

}  // namespace pyengine::cuda

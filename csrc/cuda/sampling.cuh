// What both kernels of sampling know of a row of logits.
#pragma once

#include "cuda/device.h"
#include "cuda/sampling.h"

namespace pyengine::cuda {

// Rows follow each other without gaps, so one may begin inside of 16 bytes: so many logits after
// the address at which its first four are read.
__device__ inline int shift_of(const float* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
}

// A row's edited logits: as far inside of 16 bytes as the others, in an array of their own that is
// written four at a time.
__device__ inline float* edited_row(const LogitRows& rows, int64_t r) {
  return rows.edited + r * edited_stride(rows.vocab_size) +
         shift_of(rows.logits + r * rows.vocab_size);
}

// log sum exp of a row's logits from its chunks', by all threads of a block.
__device__ inline double log_total_of(const LogitStats* stats, int chunks, double* shared) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    float best = -INFINITY;
    for (int c = lane; c < chunks; c += 32) best = fmaxf(best, stats[c].raw_max);
    best = warp_max(best);
    double total = 0;
    for (int c = lane; c < chunks; c += 32) {
      total += stats[c].raw_sum * exp(static_cast<double>(stats[c].raw_max) - best);
    }
    total = warp_sum(total);
    if (lane == 0) *shared = best + log(total);
  }
  __syncthreads();
  const double result = *shared;
  __syncthreads();
  return result;
}

}  // namespace pyengine::cuda

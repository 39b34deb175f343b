// What this machine allows, measured: the limits that benchmarks compare with.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "core/thread_pool.h"

namespace pyengine::cpu {

// Bytes per second that all threads together read from a buffer of `bytes`, the best of a few
// passes.
double read_bandwidth(ThreadPool& pool, size_t bytes);

// (name, operations per second) of all threads together, registers only, for each kind of
// arithmetic that the processor has; a fused multiply-add is two operations. Names: the type, then
// the instructions, e.g. "float32 avx512", "bfloat16 amx", "int8 avx512_vnni".
std::vector<std::pair<const char*, double>> arithmetic_peaks(ThreadPool& pool);

}  // namespace pyengine::cpu

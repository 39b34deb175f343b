// CUDA's names for the host's compiler: what the kernels and the runtime of csrc/cuda use of them,
// on the simulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda_sim/runtime_api.h"
#include "cuda_sim/sim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (::pyengine::sim::place().thread)
#define blockIdx (::pyengine::sim::place().block)
#define blockDim (::pyengine::sim::place().block_dim)
#define gridDim (::pyengine::sim::place().grid_dim)

// Shared memory of a block: `type` may be an array type. Each array is an allocation of its own,
// with red zones around it, poisoned for each block.
#define PYENGINE_SHARED(name, ...)                                \
  static const char name##_key = 0;                               \
  auto& name = *static_cast<::pyengine::sim::Same<__VA_ARGS__>*>( \
      ::pyengine::sim::shared_array(&name##_key, sizeof(__VA_ARGS__)))
#define PYENGINE_DYNAMIC_SHARED(name) \
  auto* name = static_cast<unsigned char*>(::pyengine::sim::dynamic_shared())

namespace pyengine::sim {
template <class T>
using Same = T;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  pyengine::sim::sync_threads(file, line);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  pyengine::sim::sync_warp(mask, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return pyengine::sim::ballot(mask, vote, file, line);
}
inline bool __any_sync(uint32_t mask, bool vote, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return pyengine::sim::ballot(mask, vote, file, line) != 0;
}

#define PYENGINE_SIM_SHUFFLE(name, how)                                                          \
  template <class T>                                                                             \
  inline T name(uint32_t mask, T value, int operand, int width = 32,                             \
                const char* file = __builtin_FILE(), int line = __builtin_LINE()) {              \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");               \
    uint64_t bits = 0;                                                                           \
    std::memcpy(&bits, &value, sizeof(T));                                                       \
    bits = pyengine::sim::shuffle(mask, pyengine::sim::Shuffle::how, bits, operand, width, file, \
                                  line);                                                         \
    std::memcpy(&value, &bits, sizeof(T));                                                       \
    return value;                                                                                \
  }
PYENGINE_SIM_SHUFFLE(__shfl_sync, index)
PYENGINE_SIM_SHUFFLE(__shfl_xor_sync, exclusive_or)
PYENGINE_SIM_SHUFFLE(__shfl_down_sync, down)
PYENGINE_SIM_SHUFFLE(__shfl_up_sync, up)

// One operating system thread runs all fibers, so a plain update is atomic; ThreadSanitizer is
// told.
template <class T>
T atomicAdd(T* p, T x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, T x) {
  return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  if (x > old) __atomic_store_n(p, x, __ATOMIC_RELAXED);
  return old;
}
template <class T>
T atomicMin(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  if (x < old) __atomic_store_n(p, x, __ATOMIC_RELAXED);
  return old;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
// Byte i of the result is that of (high, low) which nibble i of the selector names.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> (4 * i) & 7u;
    result |= static_cast<uint32_t>(bytes >> (8 * from) & 255u) << (8 * i);
  }
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint64_t __double_as_longlong(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
// Rounded on their own: the device's compiler must not fuse them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// What every kernel file includes: CUDA's own headers, or the simulator's (csrc/cuda_sim), and the
// small vocabulary that kernels are written in.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(PYENGINE_CUDA_SIM)
#include "cuda_sim/shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pyengine::cuda {
template <class T>
using Same = T;
}
// A shared array; `type` may be an array type.
#define PYENGINE_SHARED(name, ...) __shared__::pyengine::cuda::Same<__VA_ARGS__> name
#define PYENGINE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include "cuda/runtime.h"

namespace pyengine::cuda {

#if defined(PYENGINE_CUDA_SIM)
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
inline float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31;
  const uint32_t fraction = x.bits & 0x3ffu;
  float magnitude;
  if (exponent == 31) {
    magnitude = __uint_as_float(0x7f800000u | fraction << 13);
  } else if (exponent == 0) {
    magnitude = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    magnitude = __uint_as_float((exponent + 112) << 23 | fraction << 13);
  }
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline void narrow(float x, bf16& out) {
  const uint32_t bits = __float_as_uint(x);
  out.bits = x != x ? static_cast<uint16_t>(bits >> 16 | 0x40)
                    : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16& out) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fff;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24, rounded to even by the float addition.
    const float shifted = __uint_as_float(magnitude) + 0.5f;  // ulp of [0.5, 1) is 2^-24
    half = __float_as_uint(shifted) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}
inline uint16_t bits_of(f16 x) { return x.bits; }
inline uint16_t bits_of(bf16 x) { return x.bits; }
#else
using f16 = __half;
using bf16 = __nv_bfloat16;
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }
__device__ inline void narrow(float x, bf16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, f16& out) { out = __float2half_rn(x); }
__device__ inline uint16_t bits_of(f16 x) { return __half_as_ushort(x); }
__device__ inline uint16_t bits_of(bf16 x) { return __bfloat16_as_ushort(x); }
#endif
__device__ inline float widen(float x) { return x; }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline float widen(int8_t x) { return static_cast<float>(x); }

// x rounded to T and back.
template <class T>
__device__ inline T narrowed(float x) {
  T out;
  narrow(x, out);
  return out;
}

// Two values of T in a 32-bit word, the first in its low half, as mma takes them.
template <class T>
__device__ inline uint32_t pair_of(float low, float high) {
  return uint32_t{bits_of(narrowed<T>(low))} | uint32_t{bits_of(narrowed<T>(high))} << 16;
}
__device__ inline float low_of(uint32_t word, bf16) { return __uint_as_float(word << 16); }
__device__ inline float high_of(uint32_t word, bf16) { return __uint_as_float(word & 0xffff0000u); }
#if defined(PYENGINE_CUDA_SIM)
inline float low_of(uint32_t word, f16) { return widen(f16{static_cast<uint16_t>(word)}); }
inline float high_of(uint32_t word, f16) { return widen(f16{static_cast<uint16_t>(word >> 16)}); }
#else
__device__ inline float low_of(uint32_t word, f16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}
__device__ inline float high_of(uint32_t word, f16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
#endif

// Of both values of a word, each rounded.
#if defined(PYENGINE_CUDA_SIM)
template <class T>
inline uint32_t pair_difference(uint32_t a, uint32_t b) {
  return pair_of<T>(low_of(a, T{}) - low_of(b, T{}), high_of(a, T{}) - high_of(b, T{}));
}
template <class T>
inline uint32_t pair_product(uint32_t a, uint32_t b) {
  return pair_of<T>(low_of(a, T{}) * low_of(b, T{}), high_of(a, T{}) * high_of(b, T{}));
}
#else
template <class T>
using PairOf = std::conditional_t<std::is_same_v<T, f16>, __half2, __nv_bfloat162>;
template <class T>
__device__ inline PairOf<T> as_pair(uint32_t word) {
  return *reinterpret_cast<const PairOf<T>*>(&word);
}
template <class Pair>
__device__ inline uint32_t as_word(Pair pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class T>
__device__ inline uint32_t pair_difference(uint32_t a, uint32_t b) {
  return as_word(__hsub2(as_pair<T>(a), as_pair<T>(b)));
}
template <class T>
__device__ inline uint32_t pair_product(uint32_t a, uint32_t b) {
  return as_word(__hmul2(as_pair<T>(a), as_pair<T>(b)));
}
#endif

// Eight neighbouring values as they lie in memory.
template <class T>
struct Packed8 {
  uint4 words;
};
template <>
struct Packed8<float> {
  float4 low, high;
};
template <>
struct Packed8<int8_t> {
  uint2 words;
};

// `p` at a multiple of 16 bytes (8 for int8_t).
template <class T>
__device__ inline Packed8<T> read8(const T* p) {
  return *reinterpret_cast<const Packed8<T>*>(p);
}

template <class T>
__device__ inline void unpack8(const Packed8<T>& packed, float (&out)[8]) {
  const uint32_t w[4] = {packed.words.x, packed.words.y, packed.words.z, packed.words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = low_of(w[i], T{});
    out[2 * i + 1] = high_of(w[i], T{});
  }
}
__device__ inline void unpack8(const Packed8<float>& packed, float (&out)[8]) {
  out[0] = packed.low.x, out[1] = packed.low.y, out[2] = packed.low.z, out[3] = packed.low.w;
  out[4] = packed.high.x, out[5] = packed.high.y, out[6] = packed.high.z, out[7] = packed.high.w;
}
__device__ inline void unpack8(const Packed8<int8_t>& packed, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(packed.words.x >> (8 * i)));
    out[4 + i] = static_cast<float>(static_cast<int8_t>(packed.words.y >> (8 * i)));
  }
}

template <class T>
__device__ inline void load8(const T* p, float (&out)[8]) {
  unpack8(read8(p), out);
}

template <class T>
__device__ inline void store8(T* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) = {pair_of<T>(x[0], x[1]), pair_of<T>(x[2], x[3]),
                                  pair_of<T>(x[4], x[5]), pair_of<T>(x[6], x[7])};
}
template <>
__device__ inline void store8<float>(float* p, const float (&x)[8]) {
  *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]};
  *reinterpret_cast<float4*>(p + 4) = {x[4], x[5], x[6], x[7]};
}

constexpr uint32_t kAllLanes = 0xffffffffu;

// Every lane gets the sum (the largest) over the warp, or over groups of `width` lanes.
template <class T>
__device__ inline T warp_sum(T x, int width = 32) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ inline float warp_max(float x, int width = 32) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

// The same over a block of whole warps; `scratch` holds a value per warp and may be used again
// after the next barrier.
template <class T>
__device__ inline T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}
__device__ inline float block_max(float x, float* scratch) {
  x = warp_max(x);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float best = scratch[0];
  for (int i = 1; i < warps; ++i) best = fmaxf(best, scratch[i]);
  __syncthreads();
  return best;
}

// Every thread of every kernel calls this once before it touches what kernels before it have
// written, or writes. From compute capability 9.0 on, a kernel's blocks are put in place while the
// kernel before still runs (programmatic dependent launch): what comes before the call, as reading
// weights, overlaps with it. As each kernel waits for the whole kernel before it, order stays. The
// arrays of a step may be read before the call by all kernels but its first: they were uploaded
// before that one started.
__device__ inline void start_after_previous() {
#if defined(PYENGINE_CUDA_SIM)
  sim::wait_for_previous();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for a line of memory that is read soon.
__device__ inline void prefetch(const void* p) {
#if !defined(PYENGINE_CUDA_SIM)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  static_cast<void>(p);
#endif
}

// Queues a kernel. Throws InternalError naming it where the device refuses the launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, Stream& stream, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments... arguments) {
#if defined(PYENGINE_CUDA_SIM)
  sim::enqueue(stream.get(), [=] {
    sim::run_grid(name, grid, block, shared_bytes, [&] {
      kernel(static_cast<Parameters>(arguments)...);
      sim::require_waited();
    });
  });
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    require_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_bytes)),
                    name);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.get();
  config.attrs = &overlap;
  config.numAttrs = stream.overlaps() ? 1 : 0;
  require_success(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
#endif
}

}  // namespace pyengine::cuda

// The bfloat16 dense kernels with vdpbf16ps; everything else of "avx512_bf16" is that of "avx512".
#define PYENGINE_ISA avx512_bf16
#define PYENGINE_DOT_PAIRS

#include "cpu/isa_tables.h"
#include "cpu/vec_avx512.h"
#include "cpu/vec_int8.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/quantize_kv.inl"
#include "cpu/dense.inl"
#include "cpu/dense_bf16.inl"
// clang-format on

namespace pyengine::cpu::avx512_bf16 {
namespace {

// Time stamps for 200 rounds of 12 independent steps, the least of some tries.
template <class Step>
PYENGINE_INLINE uint64_t fastest(Step step) {
  uint64_t best = UINT64_MAX;
  for (int attempt = 0; attempt < 8; ++attempt) {
    Vf acc[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = zero();
    const uint64_t start = __rdtsc();
    for (int round = 0; round < 200; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        acc[i] = step(acc[i]);
        asm volatile("" : "+v"(acc[i]));
      }
    }
    const uint64_t ticks = __rdtsc() - start;
    best = ticks < best ? ticks : best;
  }
  return best;
}

}  // namespace

const DenseKernels& dense_bf16() { return kDenseBf16; }

// A vdpbf16ps does the work of two FMAs; processors take between half and four times as long for
// it.
bool dot_is_faster_than_fma() {
  const Vf one = set1(1.0f);
  const uint64_t dot =
      fastest([one](Vf v) __attribute__((always_inline)) { return dot_pairs(v, one, one); });
  const uint64_t fma_once =
      fastest([one](Vf v) __attribute__((always_inline)) { return fma(one, one, v); });
  return dot < fma_once * 3 / 2;
}

}  // namespace pyengine::cpu::avx512_bf16

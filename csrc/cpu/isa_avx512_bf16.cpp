// The bfloat16 dense kernels with vdpbf16ps; everything else of "avx512_bf16" is that of "avx512".
#define PYENGINE_ISA avx512_bf16
#define PYENGINE_DOT_PAIRS

#include "cpu/isa_tables.h"
#include "cpu/vec_avx512.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/dense.inl"
#include "cpu/dense_bf16.inl"
// clang-format on

namespace pyengine::cpu::avx512_bf16 {

const DenseKernels& dense_bf16() { return kDenseBf16; }

}  // namespace pyengine::cpu::avx512_bf16

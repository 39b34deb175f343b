// The quantised dense kernels with vpdpbusd (AVX-VNNI); everything else of "avx_vnni" is that of
// "avx2".
#define PYENGINE_ISA avx_vnni

#include "cpu/isa_tables.h"
#include "cpu/vec_avx2.h"
#include "cpu/vec_int8.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/dense.inl"
#include "cpu/dense_quant.inl"
// clang-format on

namespace pyengine::cpu::avx_vnni {

const DenseKernels& dense_int8() { return kDenseInt8; }
const DenseKernels& dense_int4() { return kDenseInt4; }

}  // namespace pyengine::cpu::avx_vnni

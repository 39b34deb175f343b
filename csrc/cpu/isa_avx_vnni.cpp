// The kernels of integers with vpdpbusd (AVX-VNNI); everything else of "avx_vnni" is that of
// "avx2".
#define PYENGINE_ISA avx_vnni

#include "cpu/isa_tables.h"
#include "cpu/vec_avx2.h"
#include "cpu/vec_int8.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/quantize_kv.inl"
#include "cpu/dense.inl"
#include "cpu/dense_quant.inl"
#include "cpu/attention.inl"
#include "cpu/attention_i8.inl"
// clang-format on

namespace pyengine::cpu::avx_vnni {

const DenseKernels& dense_int8() { return kDenseInt8; }
const DenseKernels& dense_int4() { return kDenseInt4; }
const AttentionKernels& attention_i8() { return kAttentionI8; }

}  // namespace pyengine::cpu::avx_vnni

// The kernels of integers with vpdpbusd (AVX-512 VNNI); everything else of "avx512_vnni" is
// that of "avx512".
#define PYENGINE_ISA avx512_vnni

#include "cpu/isa_tables.h"
#include "cpu/vec_avx512.h"
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

namespace pyengine::cpu::avx512_vnni {

const DenseKernels& dense_int8() { return kDenseInt8; }
const DenseKernels& dense_int4() { return kDenseInt4; }
const AttentionKernels& attention_i8() { return kAttentionI8; }

}  // namespace pyengine::cpu::avx512_vnni

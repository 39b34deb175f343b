// The kernels of "amx" that use its tiles; everything else of it is that of "avx512".
#define PYENGINE_ISA amx

#include "cpu/isa_tables.h"
#include "cpu/vec_avx512.h"
#include "cpu/vec_int8.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/quantize_kv.inl"
#include "cpu/dense.inl"
#include "cpu/dense_quant.inl"
#include "cpu/dense_quant_amx.inl"
#include "cpu/dense_bf16.inl"
#include "cpu/dense_bf16_amx.inl"
#include "cpu/attention.inl"
#include "cpu/attention_amx.inl"
#include "cpu/attention_i8.inl"
#include "cpu/attention_i8_amx.inl"
// clang-format on

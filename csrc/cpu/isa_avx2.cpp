// Every kernel for the instruction set "avx2".
#define PYENGINE_ISA avx2
#define PYENGINE_ISA_NAME "avx2"
#define PYENGINE_NIBBLE_PAIRS

#include "cpu/isa_tables.h"
#include "cpu/vec_avx2.h"
#include "cpu/vec_int8.h"
// The kernels, in order of use.
#include "cpu/math.inl"
// clang-format off
#include "cpu/quantize_kv.inl"
#include "cpu/dense.inl"
#include "cpu/dense_f32.inl"
#include "cpu/dense_bf16.inl"
#include "cpu/dense_quant.inl"
#include "cpu/dense_nibbles.inl"
#include "cpu/attention.inl"
#include "cpu/attention_fma.inl"
#include "cpu/attention_i8.inl"
#include "cpu/elementwise.inl"
#include "cpu/sampling.inl"
#include "cpu/quantize.inl"
#include "cpu/table.inl"
// clang-format on

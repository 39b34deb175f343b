// The tables that the per-instruction-set files define (isa_*.cpp).
#pragma once

#include "cpu/kernels.h"

namespace pyengine::cpu {

namespace baseline {
const Kernels& kernels();
}

#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx_vnni {
const DenseKernels& dense_int8();
const DenseKernels& dense_int4();
const AttentionKernels& attention_i8();
}  // namespace avx_vnni
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_vnni {
const DenseKernels& dense_int8();
const DenseKernels& dense_int4();
const AttentionKernels& attention_i8();
}  // namespace avx512_vnni
namespace avx512_bf16 {
const DenseKernels& dense_bf16();
bool dot_is_faster_than_fma();  // measured, some microseconds
}  // namespace avx512_bf16
namespace amx {
const DenseKernels& dense_bf16();
const AttentionKernels& attention_bf16();
const AttentionKernels& attention_i8();
const DenseKernels& dense_int8();
const DenseKernels& dense_int4();
}  // namespace amx
#endif

}  // namespace pyengine::cpu

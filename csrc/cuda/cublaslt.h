// The part of cuBLASLt that csrc/cuda uses. Declared here, because the library is opened when it is
// there and neither it nor its header is needed to build; types and values are those of cublasLt.h
// of CUDA 12 and 13. The simulator has a fake of it (csrc/cuda_sim/cublaslt.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace pyengine::cuda::lt {

using Status = int;  // cublasStatus_t; 0 is success
using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;

constexpr int kComputeF32 = 68;                // CUBLAS_COMPUTE_32F
constexpr int kF32 = 0, kF16 = 2, kBF16 = 14;  // cudaDataType
constexpr int32_t kOpTranspose = 1;            // CUBLAS_OP_T

// cublasLtMatmulDescAttributes_t
constexpr int kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8;
// cublasLtMatmulPreferenceAttributes_t
constexpr int kMaxWorkspaceBytes = 1;
// cublasLtEpilogue_t; bits
constexpr int32_t kEpilogueDefault = 1, kEpilogueRelu = 2, kEpilogueBias = 4, kEpilogueGelu = 32;

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Api {
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  Status (*desc_create)(MatmulDesc*, int compute_type, int scale_type);
  Status (*desc_destroy)(MatmulDesc);
  Status (*desc_set)(MatmulDesc, int attribute, const void* value, size_t bytes);
  Status (*layout_create)(MatrixLayout*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  Status (*heuristic)(Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c,
                      MatrixLayout d, Preference, int wanted, HeuristicResult*, int* found);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout,
                   const void* b, MatrixLayout, const void* beta, const void* c, MatrixLayout,
                   void* d, MatrixLayout, const Algorithm*, void* workspace, size_t workspace_bytes,
                   cudaStream_t);
};

// Opened once; null where it is not installed.
const Api* open();

}  // namespace pyengine::cuda::lt

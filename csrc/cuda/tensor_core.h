// Tensor-core products, ldmatrix and asynchronous copies: PTX on the device, twins that follow the
// PTX manual's lane layouts on the simulator. csrc/tests/test_cuda_sim.cpp checks the twins against
// a table of its own.
//
// m16n8k16, lane 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16", floating point):
//   A (16 x 16)  a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8), pairs
//   along k B (16 x 8)   b[0] (k 2t, n g), b[1] (k 2t + 8, n g), pairs along k C, D         d[0]
//   (g, 2t), d[1] (g, 2t + 1), d[2] (g + 8, 2t), d[3] (g + 8, 2t + 1)
#pragma once

#include "cuda/device.h"

namespace pyengine::cuda {

#if defined(PYENGINE_CUDA_SIM)

// Lanes see each other's registers here, which ThreadSanitizer would take for a race.
#define PYENGINE_SIM_EXCHANGE __attribute__((no_sanitize_thread))

template <class T>
struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
PYENGINE_SIM_EXCHANGE void mma_combine(uint32_t, void* const lanes[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<MmaLane<T>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + (i % 2) * 8, k = 2 * t + (i / 2) * 8;
      a[row][k] = low_of(l.a[i], T{});
      a[row][k + 1] = high_of(l.a[i], T{});
    }
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * t + i * 8;
      b[k][g] = low_of(l.b[i], T{});
      b[k + 1][g] = high_of(l.b[i], T{});
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaLane<T>*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
      double sum = d[i];
      for (int k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
      d[i] = static_cast<float>(sum);
    }
  }
}

// d += a b over a warp.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  MmaLane<T> lane{d, a, b};
  sim::collective(kAllLanes, mma_combine<T>, &lane, file, line);
}

struct MatrixLane {
  uint16_t row[8];
  uint32_t* out;
};

template <int count, bool transposed>
PYENGINE_SIM_EXCHANGE void ldmatrix_combine(uint32_t, void* const lanes[32]) {
  for (int i = 0; i < count; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4, c = 2 * (lane % 4) + half;
        const auto* from = static_cast<MatrixLane*>(lanes[8 * i + (transposed ? c : r)]);
        word |= uint32_t{from->row[transposed ? r : c]} << (16 * half);
      }
      static_cast<MatrixLane*>(lanes[lane])->out[i] = word;
    }
  }
}

template <int count, bool transposed>
void ldmatrix(uint32_t* out, const void* row, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    throw sim::Fault("ldmatrix: a row is not at a multiple of 16 bytes");
  }
  MatrixLane lane;
  lane.out = out;
  for (int i = 0; i < 8; ++i) lane.row[i] = static_cast<const uint16_t*>(row)[i];
  sim::collective(kAllLanes, ldmatrix_combine<count, transposed>, &lane, file, line);
}
// 8 x 8 matrices of 16-bit values from shared memory: lane l holds the address of row l % 8 of
// matrix l / 8, and gets elements (l / 4, 2 (l % 4)) and the next of each (of its transpose).
inline void ldmatrix4(uint32_t (&out)[4], const void* row, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  ldmatrix<4, false>(out, row, file, line);
}
inline void ldmatrix4_transposed(uint32_t (&out)[4], const void* row,
                                 const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ldmatrix<4, true>(out, row, file, line);
}

// 16 bytes from global to shared memory; if not `valid`, zeros. Written when a wait covers them.
inline void copy_async(void* shared, const void* global, bool valid) {
  sim::copy_async(shared, global, 16, valid ? 16 : 0);
}
inline void copy_async_commit() { sim::copy_async_commit(); }
template <int groups_left>
inline void copy_async_wait() {
  sim::copy_async_wait(groups_left);
}

#else

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Compute capability 7.5 has half the depth: the same registers in two steps.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
#endif
}

template <>
__device__ inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // bfloat16 is refused on 7.5 before anything runs
#endif
}

__device__ inline void ldmatrix4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix4_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}
__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int groups_left>
__device__ inline void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

#endif

}  // namespace pyengine::cuda

// Random tensors in the dtypes of the operations, and memory that ends where they end.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "core/dtype.h"

namespace pyengine::testing {

// PYENGINE_TEST_QUICK=1: the same operations on fewer and smaller shapes, for emulated processors
// and ThreadSanitizer, under which everything takes many times as long. Memory then goes on behind
// the weights: QEMU 7.2 reads whole vectors where AVX2's masked loads must not.
inline const bool quick = std::getenv("PYENGINE_TEST_QUICK") != nullptr;

inline std::mt19937 rng(1);

inline float normal() { return std::normal_distribution<float>()(rng); }
inline int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

inline float widen(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A tensor in both dtypes; the float32 values are those of the dtype asked for.
struct Tensor {
  DType dtype;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;

  Tensor(DType t, size_t n, float scale) : dtype(t), f32(n), bf16(t == DType::bf16 ? n : 0) {
    for (size_t i = 0; i < n; ++i) {
      f32[i] = normal() * scale;
      if (t == DType::bf16) {
        bf16[i] = narrow(f32[i]);
        f32[i] = widen(bf16[i]);
      }
    }
  }
  const void* data() const {
    return dtype == DType::bf16 ? static_cast<const void*>(bf16.data()) : f32.data();
  }
  const void* row(size_t element) const {
    return dtype == DType::bf16 ? static_cast<const void*>(bf16.data() + element)
                                : f32.data() + element;
  }
};

// A copy that ends where the next page may not be read (unless quick), like weights at the end of a
// mapped file.
class GuardedCopy {
 public:
  GuardedCopy(const void* data, size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + page - 1) / page * page;
    size_ = usable + page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (!quick && mprotect(base_ + usable, page, PROT_NONE) != 0))
      std::abort();
    data_ = base_ + usable - bytes;
    std::memcpy(data_, data, bytes);
  }
  ~GuardedCopy() { munmap(base_, size_); }
  GuardedCopy(const GuardedCopy&) = delete;
  GuardedCopy& operator=(const GuardedCopy&) = delete;
  const void* data() const { return data_; }

 private:
  char* base_;
  char* data_;
  size_t size_;
};

}  // namespace pyengine::testing

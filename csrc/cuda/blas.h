// Large products by cuBLASLt.
#pragma once

#include <map>
#include <memory>
#include <tuple>

#include "cuda/cublaslt.h"
#include "cuda/kernels.h"

namespace pyengine::cuda {

// Not thread-safe. Which algorithm cuBLASLt takes, and so the order of a sum, depends on the number
// of rows; for one number it is the same in every run.
class Blas {
 public:
  static std::unique_ptr<Blas> open();  // null where cuBLASLt is not installed
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // Whether it has the epilogue: no gelu_erf or silu, nothing that is written to the cache. Its
  // gelu_tanh is that of the hardware, off by up to 5e-4: not for float32.
  static bool can(const DenseResult& result, DType act);
  // As cuda::dense.
  void dense(Stream& stream, const void* x, DType act, int num_rows, const Dense& layer,
             const DenseResult& result);

 private:
  struct Plan;
  using Key = std::tuple<int, int64_t, int64_t, DType, Output, ops::Activation, bool>;

  explicit Blas(const lt::Api& api);
  Plan& plan(const Key& key);

  const lt::Api& api_;
  lt::Handle handle_ = nullptr;
  DeviceBuffer workspace_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace pyengine::cuda

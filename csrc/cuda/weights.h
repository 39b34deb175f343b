// From the tensors of a checkpoint to weights on the device.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "model/gpt2.h"

namespace pyengine::cuda {

// Waits for each tensor, so that the tensors' memory and the loader may go at any time. Throws
// CheckpointError, OutOfMemory.
class WeightLoader {
 public:
  // `owned` gets the memory. `for_blas`: biases of act, too.
  WeightLoader(Stream& stream, const std::map<std::string, TensorView>& tensors, DType act,
               bool for_blas, std::vector<DeviceBuffer>& owned)
      : stream_(stream), tensors_(tensors), act_(act), for_blas_(for_blas), owned_(owned) {}

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // (rows, columns) of act.
  const void* table(const std::string& name, int64_t rows, int64_t columns) {
    return convert(name, false, rows, columns, act_);
  }
  // x.weight: (N, K), or (K, N) if it is to be transposed; or what quantising made of either.
  Dense matrix(const std::string& name, bool transpose, int64_t k, int64_t n);
  Dense conv1d(const std::string& name, int64_t k, int64_t n);
  Norm norm(const std::string& name, int64_t n, float eps) {
    return {vector(name + ".weight", n), vector(name + ".bias", n), eps};
  }

 private:
  const TensorView& find(const std::string& name) const;
  const float* vector(const std::string& name, int64_t n) {
    return static_cast<const float*>(convert(name, false, 1, n, DType::f32));
  }
  const void* convert(const std::string& name, bool transpose, int64_t n, int64_t k, DType to);
  // `arrange(from, to)` queues what makes `bytes` bytes of weights of `tensor`.
  template <class F>
  const void* place(const TensorView& tensor, size_t bytes, F&& arrange);

  Stream& stream_;
  const std::map<std::string, TensorView>& tensors_;
  DType act_;
  bool for_blas_;
  std::vector<DeviceBuffer>& owned_;
  DeviceBuffer staging_;  // a tensor on its way
};

}  // namespace pyengine::cuda

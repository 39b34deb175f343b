#include "core/errors.h"
#include "cuda/weights.h"

namespace pyengine::cuda {

namespace {

[[noreturn]] void refuse(const std::string& name, const TensorView& tensor,
                         const std::string& expected) {
  throw CheckpointError("tensor '" + name + "' holds " + std::to_string(tensor.bytes) +
                        " bytes of " + name_of(tensor.dtype) + ", but " + expected +
                        " are expected");
}

}  // namespace

const TensorView& WeightLoader::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw CheckpointError("tensor '" + name + "' is missing");
  return found->second;
}

template <class F>
const void* WeightLoader::place(const TensorView& tensor, size_t bytes, F&& arrange) {
  if (staging_.size() < tensor.bytes) {
    staging_ = DeviceBuffer();  // never both at once
    staging_ = DeviceBuffer(tensor.bytes, "a tensor");
  }
  owned_.emplace_back(bytes, "weights");
  void* const to = owned_.back().data();
  stream_.upload(staging_.data(), tensor.data, tensor.bytes);
  arrange(staging_.data(), to);
  stream_.wait();  // the staging buffer is free again
  return to;
}

const void* WeightLoader::convert(const std::string& name, bool transpose, int64_t n, int64_t k,
                                  DType to) {
  const TensorView& tensor = find(name);
  if (tensor.dtype == DType::i8 || tensor.bytes != n * k * size_of(tensor.dtype)) {
    refuse(name, tensor, std::to_string(n * k) + " floating-point numbers");
  }
  return place(tensor, n * k * size_of(to), [&](const void* from, void* out) {
    convert_weight(stream_, from, tensor.dtype, transpose, n, k, out, to);
  });
}

Dense WeightLoader::matrix(const std::string& name, bool transpose, int64_t k, int64_t n) {
  Dense dense;
  dense.k = k;
  dense.n = n;
  if (!has(name + ".scale")) {
    dense.weight = convert(name + ".weight", transpose, n, k, act_);
    return dense;
  }
  auto integers = [&](const std::string& part, int64_t bytes, auto&& arrange) {
    const TensorView& tensor = find(name + part);
    if (tensor.dtype != DType::i8 || tensor.bytes != static_cast<size_t>(bytes)) {
      refuse(name + part, tensor, std::to_string(bytes) + " bytes of integers");
    }
    return static_cast<const uint8_t*>(place(tensor, tensor.bytes, arrange));
  };
  const bool nibbles = has(name + ".group");
  QuantizedMatrix& w = dense.quantized;
  w.k = k;
  w.n = n;
  w.scale = vector(name + ".scale", n);
  w.integers = integers(
      ".weight", nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n),
      [&](const void* from, void* to) { arrange_integers(stream_, from, nibbles, k, n, to); });
  if (nibbles) {
    w.groups = integers(".group", ops::group_bytes(k, n), [&](const void* from, void* to) {
      arrange_groups(stream_, from, k, n, to);
    });
  }
  return dense;
}

Dense WeightLoader::conv1d(const std::string& name, int64_t k, int64_t n) {
  Dense dense = matrix(name, true, k, n);
  dense.bias = vector(name + ".bias", n);
  if (dense.weight == nullptr) return dense;
  const bool same = act_ == DType::f32 || !for_blas_;
  dense.bias_act = same ? dense.bias : convert(name + ".bias", false, 1, n, act_);
  return dense;
}

}  // namespace pyengine::cuda

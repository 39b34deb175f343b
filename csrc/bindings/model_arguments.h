// Arguments of the models' constructors and steps, shared by the CPU's and those of devices.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "core/file_guard.h"

namespace pyengine::bindings {

// pybind11 calls a value of a wrong type a RuntimeError, naming neither value nor place.
template <class T>
T cast_or_refuse(py::handle value, const std::string& what) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(what + ", not " + std::string(py::str(py::type::handle_of(value))));
  }
}

GPT2Config config_from(const py::dict& config);

// Weights as Python gives them: name -> (buffer, dtype, shape). Keeps the buffers.
class Weights {
 public:
  explicit Weights(const py::object& weights);

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

  // Runs `f`, which reads weights. What comes of a file that has changed is worth nothing, an error
  // that its numbers have led to included.
  template <class F>
  void read(F&& f) const {
    auto check = [this] {
      for (const FileGuard* file : files_) file->check();
    };
    try {
      f();
    } catch (...) {
      check();
      throw;
    }
    check();
  }

 private:
  std::vector<BufferView> buffers_;
  std::set<const FileGuard*> files_;  // that hold weights
  std::map<std::string, TensorView> tensors_;
};

// Of `step`, checked against each other; keeps the buffers.
class StepArguments {
 public:
  StepArguments(const Batch& batch, py::handle request_slot, py::handle score_rows,
                py::handle targets, int32_t top_n, py::handle num_drafts);

  const int32_t* slots() const { return slots_.begin(); }
  const int32_t* drafts() const { return drafts_ ? drafts_->begin() : nullptr; }
  const ScoredRows& scored() const { return scored_; }

 private:
  Int32View slots_;
  std::optional<Int32View> drafts_, rows_, targets_;
  ScoredRows scored_;
};

// `forward` of those rows, or of all: run(rows, how many, logits), without the GIL.
py::array_t<float> forward_rows(const Batch& batch, const py::object& rows, int32_t vocab_size,
                                const std::function<void(const int32_t*, int32_t, float*)>& run);

}  // namespace pyengine::bindings

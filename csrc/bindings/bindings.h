// What the files of the extension module share: buffers of Python objects, and the objects that are
// more than their C++ class (a mutex, references that must live).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/thread_pool.h"
#include "cpu/dispatch.h"
#include "kv/kv_cache.h"
#include "model/batch.h"
#include "model/gpt2.h"
#include "ops/exec_context.h"
#include "sampling/sampler.h"

namespace pyengine::bindings {

namespace py = pybind11;

// float32 in C order, each at a multiple of 4 bytes; NumPy makes a copy of what is not.
using AlignedFloats =
    py::array_t<float, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;

// A C-contiguous view of an object of the buffer protocol; keeps the object and its memory alive.
class BufferView {
 public:
  BufferView(py::handle object, const char* name);
  ~BufferView();
  BufferView(BufferView&& other) noexcept;
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  const void* data() const { return view_.buf; }
  size_t bytes() const { return static_cast<size_t>(view_.len); }
  const Py_buffer& raw() const { return view_; }

 private:
  Py_buffer view_{};
};

// A BufferView of 32-bit signed integers. Throws RequestError naming the argument.
class Int32View : public BufferView {
 public:
  Int32View(py::handle object, const char* name);
  const int32_t* begin() const { return static_cast<const int32_t*>(data()); }
  const int32_t* end() const { return begin() + size(); }
  int64_t size() const { return static_cast<int64_t>(bytes() / sizeof(int32_t)); }
  std::vector<int32_t> copy() const { return {begin(), end()}; }
};

// ExecContext and what it refers to. Whoever computes holds `mutex`: one step at a time.
struct PyExecContext {
  PyExecContext(int num_threads, const char* isa)
      : kernels(cpu::kernels_for(isa)), pool(num_threads), context{pool, arena, kernels} {}

  const cpu::Kernels& kernels;
  ThreadPool pool;
  Arena arena;
  Profile profile;  // of the steps since start_profile
  ExecContext context;
  std::mutex mutex;
};

struct PyKVCache {
  PyKVCache(int32_t n_layer, const KVLayout& layout, int32_t num_blocks)
      : cache(n_layer, layout, num_blocks) {}
  KVCache cache;
  std::mutex mutex;
};

// A Sampler with the callables of slots that have one, and what those raised. `mutex` guards the
// sampler; the GIL guards the rest.
struct PySampler {
  explicit PySampler(int32_t num_slots);
  Sampler sampler;
  std::mutex mutex;
  std::vector<py::object> processors;  // by slot; null: none
  std::vector<py::object> errors;      // by slot
};

// Throws ConfigError unless `name` is "float32", "bfloat16" or "float16".
DType dtype_from(const std::string& name);
DType kv_dtype_from(const std::string& name);              // "float32", "bfloat16" or "int8"
ops::Activation activation_from(const std::string& name);  // also "none"

void bind_kv(py::module_& m);
void bind_model(py::module_& m);
void bind_device(py::module_& m);  // models on a device of their own
void bind_sampling(py::module_& m);
void bind_drafting(py::module_& m);
void bind_quantize(py::module_& m);
void bind_text(py::module_& m);
void bind_ops(py::module_& m);  // the submodule `ops`

}  // namespace pyengine::bindings

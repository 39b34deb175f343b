// pyengine._C: the only C++ that knows Python. Documented in pyengine/_C/__init__.pyi.
#include <cstdlib>

#include "bindings/bindings.h"
#include "core/cpu_count.h"
#include "core/errors.h"
#include "core/file_guard.h"
#include "cpu/probes.h"

namespace pyengine::bindings {

BufferView::BufferView(py::handle object, const char* name) {
  if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a C-contiguous buffer, not " +
                         std::string(py::str(py::type::handle_of(object))));
  }
}

BufferView::~BufferView() { PyBuffer_Release(&view_); }

BufferView::BufferView(BufferView&& other) noexcept : view_(other.view_) {
  other.view_ = Py_buffer{};  // releasing an empty one does nothing
}

Int32View::Int32View(py::handle object, const char* name) : BufferView(object, name) {
  const char* format = raw().format != nullptr ? raw().format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  bool is_signed = (*format == 'i' || *format == 'l' || *format == 'q') && format[1] == '\0';
  if (!is_signed || raw().itemsize != sizeof(int32_t)) {
    throw py::type_error(std::string(name) + " must hold int32, not items of format '" +
                         (raw().format != nullptr ? raw().format : "B") + "'");
  }
  if (bytes() > 0 && reinterpret_cast<uintptr_t>(data()) % sizeof(int32_t) != 0) {
    throw py::type_error(std::string(name) + " must lie at a multiple of 4 bytes: copy it");
  }
}

DType dtype_from(const std::string& name) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw ConfigError("dtype is '" + name + "', but must be float32, bfloat16 or float16");
}

DType kv_dtype_from(const std::string& name) {
  for (DType dtype : {DType::f32, DType::bf16, DType::i8}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw ConfigError("KV cache: dtype is '" + name + "', but must be float32, bfloat16 or int8");
}

ops::Activation activation_from(const std::string& name) {
  if (name == "none") return ops::Activation::none;
  if (name == "gelu_tanh") return ops::Activation::gelu_tanh;
  if (name == "gelu_erf") return ops::Activation::gelu_erf;
  if (name == "relu") return ops::Activation::relu;
  if (name == "silu") return ops::Activation::silu;
  throw ConfigError("config: activation is '" + name +
                    "', but must be gelu_tanh, gelu_erf, relu or silu");
}

namespace {

// Bytes that are mapped from a file, and the guard of that file.
struct PyFileView {
  PyFileView(const py::object& mapping, int fd, std::string path)
      : buffer(mapping, "mapping"), guard(buffer.data(), buffer.bytes(), fd, std::move(path)) {}

  BufferView buffer;
  FileGuard guard;
};

// The Python classes of the same names, looked up only when there is an error to raise.
void raise_python(const char* name, const std::exception& e) {
  py::object type = py::module_::import("pyengine.errors").attr(name);
  // A name of a file or a variable in the message may be in any encoding, or in none.
  const std::string what = e.what();
  auto message = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(what.data(), static_cast<py::ssize_t>(what.size()), "backslashreplace"));
  if (message) PyErr_SetObject(type.ptr(), message.ptr());
}

void translate(std::exception_ptr error) {
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const CheckpointError& e) {
    raise_python("CheckpointError", e);
  } catch (const ConfigError& e) {
    raise_python("ConfigError", e);
  } catch (const RequestError& e) {
    raise_python("RequestError", e);
  } catch (const OutOfMemory& e) {
    raise_python("OutOfMemory", e);
  } catch (const InternalError& e) {
    raise_python("InternalError", e);
  } catch (const PyEngineError& e) {
    raise_python("PyEngineError", e);
  } catch (const std::bad_alloc& e) {
    raise_python("OutOfMemory", e);
  }
}

py::dict stop_profile(PyExecContext& self) {
  Profile profile;
  {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(self.mutex);
    self.context.profile = nullptr;
    profile = self.profile;
  }
  py::dict parts;
  for (int i = 0; i < kNumParts; ++i) {
    const auto part = static_cast<Part>(i);
    const PartTotals& totals = profile[part];
    if (totals.calls == 0) continue;
    parts[name_of(part)] = py::make_tuple(totals.calls, totals.nanoseconds * 1e-9,
                                          totals.cost.bytes, totals.cost.operations);
  }
  return parts;
}

}  // namespace

}  // namespace pyengine::bindings

PYBIND11_MODULE(_C, m) {
  using namespace pyengine;            // NOLINT
  using namespace pyengine::bindings;  // NOLINT
  py::options options;
  options.disable_function_signatures();
  m.doc() = "Kernels, model, KV cache and sampler of pyengine; documented in the stubs beside it.";
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  py::register_local_exception_translator(translate);
  m.def("available_isas", [] { return cpu::available_isas(); });
  m.def("default_num_threads", [] { return usable_cpus(); });
  py::class_<PyExecContext>(m, "ExecContext")
      .def(py::init([](int num_threads, const std::optional<std::string>& isa) {
             const char* name = isa ? isa->c_str() : std::getenv("PYENGINE_ISA");
             return std::make_unique<PyExecContext>(num_threads, name);
           }),
           py::arg("num_threads") = 0, py::arg("isa") = py::none())
      .def_property_readonly("num_threads",
                             [](const PyExecContext& c) { return c.pool.num_threads(); })
      .def_property_readonly("isa", [](const PyExecContext& c) { return c.kernels.isa; })
      .def("start_profile",
           [](PyExecContext& self) {
             py::gil_scoped_release release;
             std::lock_guard<std::mutex> lock(self.mutex);
             self.profile = Profile();
             self.context.profile = &self.profile;
           })
      .def("stop_profile", &stop_profile)
      .def(
          "read_bandwidth",
          [](PyExecContext& self, size_t bytes) {
            py::gil_scoped_release release;
            std::lock_guard<std::mutex> lock(self.mutex);
            return cpu::read_bandwidth(self.pool, bytes);
          },
          py::arg("bytes"))
      .def("arithmetic_peaks", [](PyExecContext& self) {
        py::dict peaks;
        std::vector<std::pair<const char*, double>> found;
        {
          py::gil_scoped_release release;
          std::lock_guard<std::mutex> lock(self.mutex);
          found = cpu::arithmetic_peaks(self.pool);
        }
        for (auto [name, rate] : found) peaks[name] = rate;
        return peaks;
      });
  py::class_<PyFileView>(m, "FileView", py::buffer_protocol())
      .def(py::init([](const py::object& mapping, int fd, const py::str& path) {
             // os.fsencode's way back from a name that is not UTF-8
             auto bytes = py::reinterpret_steal<py::bytes>(
                 PyUnicode_AsEncodedString(path.ptr(), "utf-8", "surrogateescape"));
             if (!bytes) throw py::error_already_set();
             return std::make_unique<PyFileView>(mapping, fd, std::string(bytes));
           }),
           py::arg("mapping"), py::arg("fd"), py::arg("path"))
      .def_buffer([](PyFileView& self) {
        auto* data = static_cast<const uint8_t*>(self.buffer.data());
        return py::buffer_info(data, static_cast<py::ssize_t>(self.buffer.bytes()));
      })
      .def("check", [](const PyFileView& self) { self.guard.check(); });
  bind_kv(m);
  bind_sampling(m);
  bind_drafting(m);
  bind_model(m);
  bind_device(m);
  bind_quantize(m);
  bind_text(m);
  py::module_ ops = m.def_submodule("ops", "Every operation of csrc/ops/ops.h, singly; for tests.");
  bind_ops(ops);
}

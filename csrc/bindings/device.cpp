// DeviceModel: a model on a GPU, through the library of the CUDA back end.
#include <optional>

#include "bindings/model_arguments.h"
#include "model/device_gpt2.h"

namespace pyengine::bindings {

namespace {

py::dict describe(const cuda::BackendDevice& device) {
  py::dict d;
  d["name"] = device.name;
  d["capability"] = py::make_tuple(device.major, device.minor);
  d["total_memory"] = device.total_memory;
  d["free_memory"] = device.free_memory;
  return d;
}

class PyDeviceModel {
 public:
  PyDeviceModel(py::object ctx, const py::object& config, const py::object& weights,
                const std::string& dtype, const std::string& kv_cache_dtype, int32_t num_blocks,
                const std::string& library)
      : ctx_object_(std::move(ctx)),
        ctx_(cast_or_refuse<PyExecContext&>(ctx_object_, "ctx must be an ExecContext")),
        dtype_(dtype_from(dtype)) {
    const Weights tensors(weights);
    const GPT2Config c = config_from(py::dict(config));
    const DType kv = kv_cache_dtype == "int8" ? DType::i8 : dtype_from(kv_cache_dtype);
    py::gil_scoped_release release;
    c.require_valid();
    tensors.read([&] {
      auto backend = open_cuda_library(library).make(c, tensors.tensors(), dtype_, kv, num_blocks);
      model_.emplace(c, std::move(backend), num_blocks);
    });
  }

  const DeviceGPT2& model() const { return *model_; }
  const py::object& context() const { return ctx_object_; }
  DType dtype() const { return dtype_; }

  StepResult step(const py::none&, PySampler& sampler, const Batch& batch, py::handle request_slot,
                  py::handle score_rows, py::handle targets, int32_t top_n, py::handle num_drafts) {
    const StepArguments arguments(batch, request_slot, score_rows, targets, top_n, num_drafts);
    StepResult result;
    py::gil_scoped_release release;
    std::scoped_lock lock(ctx_.mutex, sampler.mutex);
    model_->step(ctx_.context, sampler.sampler, batch, arguments.slots(), result,
                 arguments.scored(), arguments.drafts());
    return result;
  }

  py::array_t<float> forward(const py::none&, const Batch& batch, const py::object& rows) {
    return forward_rows(batch, rows, model_->config().vocab_size,
                        [&](const int32_t* chosen, int32_t num_rows, float* logits) {
                          std::lock_guard<std::mutex> lock(ctx_.mutex);
                          model_->forward(batch, chosen, num_rows, logits);
                        });
  }

 private:
  py::object ctx_object_;
  PyExecContext& ctx_;
  DType dtype_;
  std::optional<DeviceGPT2> model_;
};

}  // namespace

void bind_device(py::module_& m) {
  using py::arg;
  m.def(
      "cuda_device",
      [](const std::string& path) {
        const cuda::Library& library = open_cuda_library(path);
        py::dict d = describe(library.find());
        d["architectures"] = library.architectures;
        return d;
      },
      arg("library"));
  py::class_<PyDeviceModel>(m, "DeviceModel")
      .def(py::init<py::object, const py::object&, const py::object&, const std::string&,
                    const std::string&, int32_t, const std::string&>(),
           arg("ctx"), arg("config"), arg("weights"), arg("dtype"), arg("kv_cache_dtype"),
           arg("num_blocks"), arg("library"))
      .def_property_readonly("context", &PyDeviceModel::context)
      .def_property_readonly("dtype",
                             [](const PyDeviceModel& self) { return name_of(self.dtype()); })
      .def_property_readonly(
          "vocab_size", [](const PyDeviceModel& self) { return self.model().config().vocab_size; })
      .def_property_readonly(
          "device", [](const PyDeviceModel& self) { return describe(self.model().device()); })
      .def("step", &PyDeviceModel::step, arg("kv"), arg("sampler"), arg("batch"),
           arg("request_slot"), arg("score_rows") = py::none(), arg("targets") = py::none(),
           arg("top_n") = 0, arg("num_drafts") = py::none())
      .def("forward", &PyDeviceModel::forward, arg("kv"), arg("batch"), arg("rows") = py::none());
}

}  // namespace pyengine::bindings

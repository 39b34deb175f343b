// Batch and Model.
#include <optional>

#include "bindings/model_arguments.h"

namespace pyengine::bindings {

namespace {

// The model together with the context it runs on and the buffers its weights lie in.
class PyModel {
 public:
  PyModel(py::object ctx, const py::object& config, const py::object& weights,
          const std::string& dtype)
      : ctx_object_(std::move(ctx)),
        ctx_(cast_or_refuse<PyExecContext&>(ctx_object_, "ctx must be an ExecContext")),
        weights_(weights) {
    GPT2Config c = config_from(py::dict(config));
    DType d = dtype_from(dtype);
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(ctx_.mutex);
    weights_.read([&] { model_.emplace(ctx_.context, c, weights_.tensors(), d); });
  }

  const GPT2& model() const { return *model_; }
  const py::object& context() const { return ctx_object_; }

  StepResult step(PyKVCache& kv, PySampler& sampler, const Batch& batch, py::handle request_slot,
                  py::handle score_rows, py::handle targets, int32_t top_n, py::handle num_drafts) {
    const StepArguments arguments(batch, request_slot, score_rows, targets, top_n, num_drafts);
    StepResult result;
    py::gil_scoped_release release;
    std::scoped_lock lock(ctx_.mutex, kv.mutex, sampler.mutex);
    weights_.read([&] {
      model_->step(ctx_.context, kv.cache, sampler.sampler, batch, arguments.slots(), result,
                   arguments.scored(), arguments.drafts());
    });
    return result;
  }

  py::array_t<float> forward(PyKVCache& kv, const Batch& batch, const py::object& rows) {
    return forward_rows(
        batch, rows, model_->config().vocab_size,
        [&](const int32_t* chosen, int32_t num_rows, float* logits) {
          std::scoped_lock lock(ctx_.mutex, kv.mutex);
          weights_.read(
              [&] { model_->forward(ctx_.context, kv.cache, batch, chosen, num_rows, logits); });
        });
  }

 private:
  py::object ctx_object_;
  PyExecContext& ctx_;
  Weights weights_;
  std::optional<GPT2> model_;
};

}  // namespace

void bind_model(py::module_& m) {
  using py::arg;
  py::class_<Batch>(m, "Batch")
      .def(py::init([](py::handle token_ids, py::handle positions, py::handle query_start,
                       py::handle context_len, py::handle block_table,
                       const py::object& block_copies) {
             return std::make_unique<Batch>(
                 Int32View(token_ids, "token_ids").copy(), Int32View(positions, "positions").copy(),
                 Int32View(query_start, "query_start").copy(),
                 Int32View(context_len, "context_len").copy(),
                 Int32View(block_table, "block_table").copy(),
                 block_copies.is_none() ? std::vector<int32_t>()
                                        : Int32View(block_copies, "block_copies").copy());
           }),
           arg("token_ids"), arg("positions"), arg("query_start"), arg("context_len"),
           arg("block_table"), arg("block_copies") = py::none())
      .def_property_readonly("num_tokens", &Batch::num_tokens)
      .def_property_readonly("num_seqs", &Batch::num_seqs);

  py::class_<PyModel>(m, "Model")
      .def(py::init<py::object, const py::object&, const py::object&, const std::string&>(),
           arg("ctx"), arg("config"), arg("weights"), arg("dtype"))
      .def_property_readonly("context", &PyModel::context)
      .def_property_readonly("dtype",
                             [](const PyModel& self) { return name_of(self.model().dtype()); })
      .def_property_readonly("vocab_size",
                             [](const PyModel& self) { return self.model().config().vocab_size; })
      .def("step", &PyModel::step, arg("kv"), arg("sampler"), arg("batch"), arg("request_slot"),
           arg("score_rows") = py::none(), arg("targets") = py::none(), arg("top_n") = 0,
           arg("num_drafts") = py::none())
      .def("forward", &PyModel::forward, arg("kv"), arg("batch"), arg("rows") = py::none());
}

}  // namespace pyengine::bindings

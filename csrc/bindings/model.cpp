// Batch and Model.
#include <pybind11/numpy.h>

#include <cmath>
#include <map>
#include <optional>
#include <set>

#include "bindings/bindings.h"
#include "core/errors.h"
#include "core/file_guard.h"

namespace pyengine::bindings {

namespace {

template <class T>
T field(const py::dict& config, const char* name) {
  if (!config.contains(name)) {
    throw ConfigError(std::string("config: the field ") + name + " is missing");
  }
  try {
    return config[name].cast<T>();
  } catch (const py::cast_error&) {
    throw ConfigError(std::string("config: ") + name + " is " +
                      std::string(py::repr(config[name])) + ", which is of the wrong type");
  }
}

GPT2Config config_from(const py::dict& config) {
  GPT2Config c;
  c.n_layer = field<int32_t>(config, "n_layer");
  c.n_head = field<int32_t>(config, "n_head");
  c.n_embd = field<int32_t>(config, "n_embd");
  c.n_inner = field<int32_t>(config, "n_inner");
  c.n_positions = field<int32_t>(config, "n_positions");
  c.vocab_size = field<int32_t>(config, "vocab_size");
  c.activation = activation_from(field<std::string>(config, "activation"));
  c.layer_norm_epsilon = field<float>(config, "layer_norm_epsilon");
  c.scale_attn_weights = field<bool>(config, "scale_attn_weights");
  c.scale_attn_by_inverse_layer_idx = field<bool>(config, "scale_attn_by_inverse_layer_idx");
  return c;
}

// pybind11 calls a value of a wrong type a RuntimeError, naming neither value nor place.
template <class T>
T cast_or_refuse(py::handle value, const std::string& what) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(what + ", not " + std::string(py::str(py::type::handle_of(value))));
  }
}

// The model together with the context it runs on and the buffers its weights lie in.
class PyModel {
 public:
  PyModel(py::object ctx, const py::object& config, const py::object& weights,
          const std::string& dtype)
      : ctx_object_(std::move(ctx)),
        ctx_(cast_or_refuse<PyExecContext&>(ctx_object_, "ctx must be an ExecContext")) {
    const py::dict entries(weights);  // any mapping
    std::map<std::string, TensorView> tensors;
    buffers_.reserve(entries.size());
    for (auto [key, value] : entries) {
      auto name = cast_or_refuse<std::string>(key, "names of weights must be strings");
      auto entry = cast_or_refuse<std::tuple<py::object, std::string, std::vector<int64_t>>>(
          value, "weight '" + name + "' must be (buffer, dtype, shape)");
      buffers_.emplace_back(std::get<0>(entry), name.c_str());
      const BufferView& buffer = buffers_.back();
      // The buffer keeps the FileView that owns the guard.
      if (const FileGuard* file = FileGuard::find(buffer.data())) files_.insert(file);
      const std::string& type = std::get<1>(entry);
      tensors[name] = {buffer.data(), buffer.bytes(),
                       type == "uint8" ? DType::i8 : dtype_from(type), std::get<2>(entry)};
    }
    GPT2Config c = config_from(py::dict(config));
    DType d = dtype_from(dtype);
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(ctx_.mutex);
    read_files([&] { model_.emplace(ctx_.context, c, tensors, d); });
  }

  const GPT2& model() const { return *model_; }
  const py::object& context() const { return ctx_object_; }

  StepResult step(PyKVCache& kv, PySampler& sampler, const Batch& batch, py::handle request_slot,
                  py::handle score_rows, py::handle targets, int32_t top_n, py::handle num_drafts) {
    auto require_size = [&](const Int32View& view, const char* name) {
      if (view.size() == batch.num_seqs()) return;
      throw RequestError(std::string(name) + " has " + std::to_string(view.size()) +
                         " entries, but the batch " + std::to_string(batch.num_seqs()) +
                         " sequences");
    };
    Int32View slots(request_slot, "request_slot");
    require_size(slots, "request_slot");
    std::optional<Int32View> drafts;
    if (!num_drafts.is_none()) {
      drafts.emplace(num_drafts, "num_drafts");
      require_size(*drafts, "num_drafts");
    }
    std::optional<Int32View> row_view, target_view;
    ScoredRows scored;
    if (!score_rows.is_none()) {
      row_view.emplace(score_rows, "score_rows");
      target_view.emplace(targets, "targets");
      if (row_view->size() != target_view->size()) {
        throw RequestError("step: " + std::to_string(row_view->size()) + " score_rows, but " +
                           std::to_string(target_view->size()) + " targets");
      }
      scored = {row_view->begin(), target_view->begin(), static_cast<int32_t>(row_view->size()),
                top_n};
    }
    StepResult result;
    py::gil_scoped_release release;
    std::scoped_lock lock(ctx_.mutex, kv.mutex, sampler.mutex);
    read_files([&] {
      model_->step(ctx_.context, kv.cache, sampler.sampler, batch, slots.begin(), result, scored,
                   drafts ? drafts->begin() : nullptr);
    });
    return result;
  }

  py::array_t<float> forward(PyKVCache& kv, const Batch& batch, const py::object& rows) {
    std::vector<int32_t> chosen;
    if (rows.is_none()) {
      chosen.resize(batch.num_tokens());
      for (int32_t r = 0; r < batch.num_tokens(); ++r) chosen[r] = r;
    } else {
      chosen = Int32View(rows, "rows").copy();
    }
    const auto num_rows = static_cast<int32_t>(chosen.size());
    py::array_t<float> logits({py::ssize_t{num_rows}, py::ssize_t{model_->config().vocab_size}});
    float* out = logits.mutable_data();
    {
      py::gil_scoped_release release;
      std::scoped_lock lock(ctx_.mutex, kv.mutex);
      read_files(
          [&] { model_->forward(ctx_.context, kv.cache, batch, chosen.data(), num_rows, out); });
    }
    return logits;
  }

 private:
  // Runs `f`, which reads weights. What comes of a file that has changed is worth nothing, an error
  // that its numbers have led to included.
  template <class F>
  void read_files(F&& f) const {
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

  py::object ctx_object_;
  PyExecContext& ctx_;
  std::vector<BufferView> buffers_;
  std::set<const FileGuard*> files_;  // that hold weights
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

#include "bindings/model_arguments.h"

#include <numeric>
#include <tuple>

#include "core/errors.h"

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

}  // namespace

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

Weights::Weights(const py::object& weights) {
  const py::dict entries(weights);  // any mapping
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
    tensors_[name] = {buffer.data(), buffer.bytes(), type == "uint8" ? DType::i8 : dtype_from(type),
                      std::get<2>(entry)};
  }
}

StepArguments::StepArguments(const Batch& batch, py::handle request_slot, py::handle score_rows,
                             py::handle targets, int32_t top_n, py::handle num_drafts)
    : slots_(request_slot, "request_slot") {
  auto require_size = [&](const Int32View& view, const char* name) {
    if (view.size() == batch.num_seqs()) return;
    throw RequestError(std::string(name) + " has " + std::to_string(view.size()) +
                       " entries, but the batch " + std::to_string(batch.num_seqs()) +
                       " sequences");
  };
  require_size(slots_, "request_slot");
  if (!num_drafts.is_none()) {
    drafts_.emplace(num_drafts, "num_drafts");
    require_size(*drafts_, "num_drafts");
  }
  if (score_rows.is_none()) return;
  rows_.emplace(score_rows, "score_rows");
  targets_.emplace(targets, "targets");
  if (rows_->size() != targets_->size()) {
    throw RequestError("step: " + std::to_string(rows_->size()) + " score_rows, but " +
                       std::to_string(targets_->size()) + " targets");
  }
  scored_ = {rows_->begin(), targets_->begin(), static_cast<int32_t>(rows_->size()), top_n};
}

py::array_t<float> forward_rows(const Batch& batch, const py::object& rows, int32_t vocab_size,
                                const std::function<void(const int32_t*, int32_t, float*)>& run) {
  std::vector<int32_t> chosen(batch.num_tokens());
  std::iota(chosen.begin(), chosen.end(), 0);
  if (!rows.is_none()) chosen = Int32View(rows, "rows").copy();
  const auto num_rows = static_cast<int32_t>(chosen.size());
  py::array_t<float> logits({py::ssize_t{num_rows}, py::ssize_t{vocab_size}});
  float* const out = logits.mutable_data();
  {
    py::gil_scoped_release release;
    run(chosen.data(), num_rows, out);
  }
  return logits;
}

}  // namespace pyengine::bindings

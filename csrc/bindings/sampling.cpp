// Sampler and StepResult.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "bindings/bindings.h"
#include "core/errors.h"

namespace pyengine::bindings {

namespace {

// Throws RequestError where rounding to float32 would change what is asked for: 1e39 would become
// infinite, and 1e-46 greedy.
float temperature_from(double value) {
  const auto rounded = static_cast<float>(value);
  if (std::isinf(rounded) || (rounded == 0 && value != 0)) {
    throw RequestError("temperature is " + std::string(py::repr(py::float_(value))) +
                       ", which float32 cannot hold: use 0 (greedy), or 1e-38 to 1e38");
  }
  return rounded;
}

// Calls the slot's callable with (token_ids, logits), NumPy arrays of which only the second may be
// written to; it edits that, or returns other logits. What it raises is kept for take_error.
bool run_processor(PySampler& self, int32_t slot, const int32_t* tokens, int64_t n, float* logits,
                   int32_t vocab_size) {
  py::gil_scoped_acquire gil;
  try {
    py::array_t<int32_t> ids(n, tokens);
    const py::capsule borrowed(logits, [](void*) {});  // valid during the call alone
    py::array_t<float> edited({py::ssize_t{vocab_size}}, {sizeof(float)}, logits, borrowed);
    const py::object returned = self.processors[slot](ids, edited);
    if (returned.is_none()) return true;
    auto other = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(returned);
    if (!other || other.ndim() != 1 || other.shape(0) != vocab_size) {
      PyErr_Clear();
      throw RequestError("a logits processor must return None or " + std::to_string(vocab_size) +
                         " logits, and it returned " +
                         std::string(py::str(py::type::of(returned))));
    }
    if (other.data() != logits) std::copy_n(other.data(), vocab_size, logits);
    return true;
  } catch (py::error_already_set& error) {
    self.errors[slot] = error.value();
  } catch (const RequestError& error) {
    self.errors[slot] = py::module_::import("pyengine.errors").attr("RequestError")(error.what());
  }
  return false;
}

using Sequences = std::vector<std::vector<int32_t>>;

void set_slot(PySampler& self, int32_t slot, const py::object& token_ids, int64_t num_prompt,
              const std::vector<std::pair<std::vector<int32_t>, double>>& logit_bias,
              std::vector<int32_t> allowed_token_ids, double repetition_penalty,
              double presence_penalty, double frequency_penalty, int32_t no_repeat_ngram_size,
              Sequences bad_words, int32_t min_tokens, std::vector<int32_t> stop_ids,
              const py::object& processor, double temperature, int32_t top_k, double top_p,
              double min_p, double typical_p, double epsilon_cutoff, double eta_cutoff,
              double mirostat_tau, double mirostat_eta, const std::optional<double>& mirostat_mu,
              uint64_t seed, uint64_t sample_index, int32_t logprobs, int32_t num_candidates,
              std::vector<int32_t> replay) {
  SlotParams p;
  for (const auto& [ids, bias] : logit_bias) p.logit_bias.push_back({ids, float(bias)});
  p.allowed_token_ids = std::move(allowed_token_ids);
  p.repetition_penalty = static_cast<float>(repetition_penalty);
  p.presence_penalty = static_cast<float>(presence_penalty);
  p.frequency_penalty = static_cast<float>(frequency_penalty);
  p.no_repeat_ngram_size = no_repeat_ngram_size;
  p.bad_words = std::move(bad_words);
  p.min_tokens = min_tokens;
  p.stop_ids = std::move(stop_ids);
  p.has_processor = !processor.is_none();
  p.temperature = temperature_from(temperature);
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  p.typical_p = typical_p;
  p.epsilon_cutoff = epsilon_cutoff;
  p.eta_cutoff = eta_cutoff;
  p.mirostat_tau = mirostat_tau;
  p.mirostat_eta = mirostat_eta;
  p.seed = seed;
  p.sample_index = sample_index;
  p.logprobs = logprobs;
  p.num_candidates = num_candidates;
  p.replay = std::move(replay);
  std::optional<Int32View> tokens;
  SlotStart start;
  start.num_prompt = num_prompt;
  start.mirostat_mu = mirostat_mu.value_or(start.mirostat_mu);
  if (!token_ids.is_none()) {
    tokens.emplace(token_ids, "token_ids");
    start.tokens = tokens->begin();
    start.num_tokens = tokens->size();
  }
  {
    py::gil_scoped_release release;  // a step may hold the mutex for a while
    std::lock_guard<std::mutex> lock(self.mutex);
    self.sampler.set(slot, std::move(p), start);
  }
  self.processors[slot] = processor.is_none() ? py::object() : processor;
  self.errors[slot] = py::object();
}

// Rows of logits, a slot and a position for each.
struct RowArguments {
  RowArguments(const AlignedFloats& logits, py::handle slots, py::handle positions)
      : slot_view(slots, "slots"), position_view(positions, "positions") {
    if (logits.ndim() != 2 || logits.shape(0) != slot_view.size() ||
        logits.shape(0) != position_view.size() || logits.shape(1) < 1) {
      throw RequestError("logits must be (R, V), with one slot and one position per row");
    }
    rows = logits.shape(0);
    vocab_size = static_cast<int32_t>(logits.shape(1));
    copy = py::array_t<float>({logits.shape(0), logits.shape(1)});
    std::copy_n(logits.data(), logits.size(), copy.mutable_data());
    data = copy.mutable_data();
  }
  Int32View slot_view, position_view;
  int64_t rows;
  int32_t vocab_size;
  py::array_t<float> copy;  // edited in place
  float* data;
};

StepResult sample(PySampler& self, PyExecContext& ctx, const AlignedFloats& logits,
                  py::handle slots, py::handle positions, const py::object& drafts) {
  RowArguments a(logits, slots, positions);
  std::optional<Int32View> draft_view;
  if (!drafts.is_none()) {
    draft_view.emplace(drafts, "drafts");
    if (draft_view->size() != a.rows) {
      throw RequestError(
          "drafts must have one entry per row: the token that the row takes for the "
          "one before it, or -1");
    }
  }
  StepResult result;
  py::gil_scoped_release release;
  std::scoped_lock lock(ctx.mutex, self.mutex);
  self.sampler.sample(ctx.context, a.data, a.rows, a.vocab_size, a.slot_view.begin(),
                      a.position_view.begin(), result, draft_view ? draft_view->begin() : nullptr);
  return result;
}

py::array_t<float> process(PySampler& self, PyExecContext& ctx, const AlignedFloats& logits,
                           py::handle slots, py::handle positions) {
  RowArguments a(logits, slots, positions);
  {
    py::gil_scoped_release release;
    std::scoped_lock lock(ctx.mutex, self.mutex);
    self.sampler.process(ctx.context, a.data, a.rows, a.vocab_size, a.slot_view.begin(),
                         a.position_view.begin());
  }
  return a.copy;
}

}  // namespace

PySampler::PySampler(int32_t num_slots)
    : sampler(num_slots), processors(num_slots), errors(num_slots) {
  sampler.set_processor(
      [this](int32_t slot, const int32_t* tokens, int64_t n, float* logits, int32_t vocab_size) {
        return run_processor(*this, slot, tokens, n, logits, vocab_size);
      });
}

void bind_sampling(py::module_& m) {
  using py::arg;
  py::class_<StepResult>(m, "StepResult")
      .def_readonly("token_ids", &StepResult::token_ids)
      .def_readonly("logprobs", &StepResult::logprobs)
      .def_readonly("top_logprobs", &StepResult::top_logprobs)
      .def_readonly("mirostat_mu", &StepResult::mirostat_mu)
      .def_property_readonly("candidates",
                             [](const StepResult& self) {
                               py::list rows;
                               for (const std::vector<BeamCandidate>& listed : self.candidates) {
                                 py::list row;
                                 for (const BeamCandidate& c : listed) {
                                   row.append(py::make_tuple(c.id, c.score, c.logprob));
                                 }
                                 rows.append(row);
                               }
                               return rows;
                             })
      .def_readonly("scores", &StepResult::scores)
      .def_readonly("score_tops", &StepResult::score_tops);

  py::class_<PySampler>(m, "Sampler")
      .def(py::init<int32_t>(), arg("num_slots"))
      .def("set", &set_slot, arg("slot"), py::kw_only(), arg("token_ids") = py::none(),
           arg("num_prompt") = 0,
           arg("logit_bias") = std::vector<std::pair<std::vector<int32_t>, double>>(),
           arg("allowed_token_ids") = std::vector<int32_t>(), arg("repetition_penalty") = 1.0,
           arg("presence_penalty") = 0.0, arg("frequency_penalty") = 0.0,
           arg("no_repeat_ngram_size") = 0, arg("bad_words") = Sequences(), arg("min_tokens") = 0,
           arg("stop_ids") = std::vector<int32_t>(), arg("processor") = py::none(),
           arg("temperature") = 1.0, arg("top_k") = 0, arg("top_p") = 1.0, arg("min_p") = 0.0,
           arg("typical_p") = 1.0, arg("epsilon_cutoff") = 0.0, arg("eta_cutoff") = 0.0,
           arg("mirostat_tau") = 0.0, arg("mirostat_eta") = 0.1, arg("mirostat_mu") = py::none(),
           arg("seed") = 0, arg("sample_index") = 0, arg("logprobs") = -1,
           arg("num_candidates") = 0, arg("replay") = std::vector<int32_t>())
      .def(
          "set_mask",
          [](PySampler& self, int32_t slot, py::handle mask, int64_t num_masks) {
            const Int32View words(mask, "mask");
            if (num_masks < 1 || words.size() % num_masks != 0) {
              throw RequestError("set_mask: " + std::to_string(words.size()) + " words are not " +
                                 std::to_string(num_masks) + " masks");
            }
            py::gil_scoped_release release;
            std::lock_guard<std::mutex> lock(self.mutex);
            self.sampler.set_masks(slot, reinterpret_cast<const uint32_t*>(words.begin()),
                                   num_masks, words.size() / num_masks);
          },
          arg("slot"), arg("mask"), arg("num_masks") = 1)
      .def(
          "take_error",
          [](PySampler& self, int32_t slot) {
            self.sampler.require_slot(slot);
            py::object error = std::exchange(self.errors[slot], py::object());
            return error ? error : py::object(py::none());
          },
          arg("slot"))
      .def("sample", &sample, arg("ctx"), arg("logits"), arg("slots"), arg("positions"),
           arg("drafts") = py::none())
      .def("process", &process, arg("ctx"), arg("logits"), arg("slots"), arg("positions"));
}

}  // namespace pyengine::bindings

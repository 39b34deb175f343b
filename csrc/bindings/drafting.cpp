// NgramDrafter and SharedFollowers.
#include "bindings/bindings.h"
#include "drafting/ngram.h"

namespace pyengine::bindings {

void bind_drafting(py::module_& m) {
  using drafting::NgramDrafter;
  using drafting::SharedFollowers;
  using py::arg;
  py::class_<SharedFollowers, std::shared_ptr<SharedFollowers>>(m, "SharedFollowers")
      .def(py::init<int64_t>(), arg("max_tokens"))
      .def_property_readonly("num_tokens", &SharedFollowers::num_tokens);

  py::class_<NgramDrafter>(m, "NgramDrafter")
      .def(py::init<int, int, std::shared_ptr<SharedFollowers>>(), arg("min_length"),
           arg("max_length"), arg("shared") = nullptr)
      .def_property_readonly("num_tokens", &NgramDrafter::num_tokens)
      .def(
          "extend",
          [](NgramDrafter& self, py::handle token_ids) {
            const Int32View tokens(token_ids, "token_ids");
            self.extend(tokens.begin(), tokens.size());
          },
          arg("token_ids"))
      .def(
          "draft",
          [](const NgramDrafter& self, int64_t max_tokens, double least) {
            std::vector<std::pair<int32_t, double>> guesses;
            for (const drafting::Guess& guess : self.draft(max_tokens, least)) {
              guesses.emplace_back(guess.token, guess.probability);
            }
            return guesses;
          },
          arg("max_tokens"), arg("least") = 0.0);
}

}  // namespace pyengine::bindings

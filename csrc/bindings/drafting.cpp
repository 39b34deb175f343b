// NgramDrafter, SharedFollowers and NumberTokens.
#include "bindings/bindings.h"
#include "drafting/ngram.h"

namespace pyengine::bindings {

void bind_drafting(py::module_& m) {
  using drafting::NgramDrafter;
  using drafting::NumberTokens;
  using drafting::SharedFollowers;
  using py::arg;
  py::class_<SharedFollowers, std::shared_ptr<SharedFollowers>>(m, "SharedFollowers")
      .def(py::init<int64_t>(), arg("max_tokens"))
      .def_property_readonly("num_tokens", &SharedFollowers::num_tokens);

  py::class_<NumberTokens, std::shared_ptr<NumberTokens>>(m, "NumberTokens")
      .def(py::init([](py::handle token_ids) {
             return std::make_shared<NumberTokens>(Int32View(token_ids, "token_ids").copy());
           }),
           arg("token_ids"))
      .def("__contains__", &NumberTokens::contains, arg("token_id"));

  py::class_<NgramDrafter>(m, "NgramDrafter")
      .def(py::init([](int min_length, int max_length, std::shared_ptr<SharedFollowers> shared,
                       std::shared_ptr<NumberTokens> numbers) {
             return NgramDrafter(min_length, max_length, std::move(shared), std::move(numbers));
           }),
           arg("min_length"), arg("max_length"), arg("shared") = nullptr, arg("numbers") = nullptr)
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

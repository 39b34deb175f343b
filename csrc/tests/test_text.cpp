// Bytes to characters, and stop strings. More of both is in tests/model/test_detokenizer.py and
// tests/engine/test_text.py, against Python.
#include <memory>
#include <string>
#include <string_view>

#include "check.h"
#include "text/stoppable.h"
#include "text/utf8.h"

using namespace pyengine::text;  // NOLINT
using std::string_view_literals::operator""sv;

TEST(whole_characters_come_out_and_a_half_one_waits) {
  std::string text;
  CHECK_EQ(append_characters("a\xE2\x82\xAC\xF0\x9F\x98"sv, text), size_t{4});
  CHECK_EQ(text, std::string("a\xE2\x82\xAC"));
  CHECK_EQ(append_characters(""sv, text), size_t{0});
}

TEST(what_cannot_become_a_character_is_replaced_once_per_maximal_subpart) {
  std::string text;
  // Overlong, a surrogate, beyond U+10FFFF, a lone continuation, and a lead without its second
  // byte.
  for (std::string_view bytes :
       {"\xC0\x80"sv, "\xED\xA0\x80"sv, "\xF4\x90\x80\x80"sv, "\x80"sv, "\xE2\x82x"sv}) {
    text.clear();
    CHECK_EQ(append_characters(bytes, text), bytes.size());
    size_t replaced = 0;
    for (size_t at = 0; (at = text.find(kReplacement, at)) != std::string::npos; ++at) ++replaced;
    CHECK_EQ(replaced, bytes.back() == 'x' ? size_t{1} : bytes.size());
  }
}

TEST(a_text_ends_before_its_stop_string_and_never_shows_its_beginning) {
  auto stop = std::make_shared<const StopStrings>(std::vector<std::string>{"END", "\xE2\x82\xAC!"});
  StoppableText text(stop, false, "END of the prompt ");
  CHECK_EQ(text.extend("a E"), -1);
  CHECK_EQ(std::string(text.take()), std::string("END of the prompt a "));
  CHECK_EQ(text.extend("N"), -1);
  CHECK_EQ(text.take().size(), size_t{0});
  CHECK_EQ(text.extend("x\xE2\x82\xAC"), -1);
  CHECK_EQ(std::string(text.take()), std::string("ENx"));
  CHECK_EQ(text.extend("!?"), 1);
  CHECK(text.finished());
  CHECK_EQ(text.text(), std::string("END of the prompt a ENx"));
  CHECK_EQ(text.extend("more"), -1);
  CHECK_EQ(text.text(), std::string("END of the prompt a ENx"));
}

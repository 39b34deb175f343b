// A text that grows until one of its stop strings is complete.
#pragma once

#include <bitset>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace pyengine::text {

// Stop strings, in UTF-8, and what tells quickly that they are not there. Whole characters only
// ever match whole characters, so that bytes can be compared.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> strings);

  struct Hit {
    size_t at;
    int index;  // of the stop string; -1: none is complete
  };
  // The stop string that is complete first in text[start, ...), the longest of those that are: as
  // if the text came by single characters. `piece` is what is new at its end.
  Hit find(std::string_view text, size_t start, std::string_view piece) const;
  // Bytes at the end of `text` that could be the beginning of one, as many as possible.
  size_t held_back(std::string_view text) const;
  // Bytes of a stop string that may stand before a piece that completes it.
  size_t overlap() const { return overlap_; }
  const std::string& operator[](int index) const { return strings_[index]; }

 private:
  std::vector<std::string> strings_;
  std::bitset<256> firsts_, lasts_;
  size_t overlap_ = 0;
};

class StoppableText {
 public:
  // `include_stop`: the text is cut after a stop string, not before it. No stop string is looked
  // for in `text`, with which it begins.
  StoppableText(std::shared_ptr<const StopStrings> stop, bool include_stop, std::string text);

  // Adds a piece of whole characters; the index of the stop string that ends the text, or -1. A
  // piece with `may_stop` false is no part of a stop string.
  int extend(std::string_view piece, bool may_stop = true);
  // Nothing follows: nothing is held back from here on.
  void finish() { finished_ = true; }
  bool finished() const { return finished_; }
  // What may be shown and was not taken before; until the text changes.
  std::string_view take();
  const std::string& text() const { return text_; }

 private:
  std::shared_ptr<const StopStrings> stop_;
  bool include_stop_;
  std::string text_;
  size_t searched_from_;
  size_t shown_ = 0;
  bool finished_ = false;
};

}  // namespace pyengine::text

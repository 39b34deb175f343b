// Bytes of tokens to UTF-8 without half characters.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace pyengine::text {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Appends the characters of `bytes` to `text`, one U+FFFD for each maximal subpart that cannot
// become a character (Unicode 3.9, table 3-7; as Python's "replace" does). Returns how many bytes
// that used: all, unless they end with the beginning of a character.
size_t append_characters(std::string_view bytes, std::string& text);

// Where the last character that begins at or before `at` begins.
size_t floor_character(std::string_view text, size_t at);

}  // namespace pyengine::text

#include "text/utf8.h"

#include <cstdint>

namespace pyengine::text {

namespace {

struct Lead {
  int following = 0;    // bytes; 0: no character begins like this
  uint8_t low = 0x80;   // of the second byte, which tells overlong forms, surrogates
  uint8_t high = 0xBF;  // and what is beyond U+10FFFF
};

Lead lead_of(uint8_t byte) {
  if (byte < 0xC2 || byte > 0xF4) return {};
  if (byte < 0xE0) return {1};
  if (byte == 0xE0) return {2, 0xA0};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte < 0xF0) return {2};
  if (byte == 0xF0) return {3, 0x90};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {3};
}

}  // namespace

size_t append_characters(std::string_view bytes, std::string& text) {
  size_t at = 0;
  while (at < bytes.size()) {
    size_t end = at;
    while (end < bytes.size() && static_cast<uint8_t>(bytes[end]) < 0x80) ++end;
    text.append(bytes, at, end - at);
    at = end;
    if (at == bytes.size()) break;
    const Lead lead = lead_of(static_cast<uint8_t>(bytes[at]));
    bool is_whole = lead.following > 0;
    int length = 1;
    for (; is_whole && length <= lead.following; ++length) {
      if (at + length == bytes.size()) return at;
      const auto byte = static_cast<uint8_t>(bytes[at + length]);
      const bool is_second = length == 1;
      is_whole = byte >= (is_second ? lead.low : 0x80) && byte <= (is_second ? lead.high : 0xBF);
      if (!is_whole) break;
    }
    if (is_whole) {
      text.append(bytes, at, length);
    } else {
      text.append(kReplacement);
    }
    at += length;
  }
  return at;
}

size_t floor_character(std::string_view text, size_t at) {
  while (at > 0 && at < text.size() && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

}  // namespace pyengine::text

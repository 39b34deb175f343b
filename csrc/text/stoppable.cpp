#include "text/stoppable.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace pyengine::text {

namespace {

uint8_t byte(char c) { return static_cast<uint8_t>(c); }

}  // namespace

StopStrings::StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
  for (const std::string& s : strings_) {
    firsts_.set(byte(s.front()));
    lasts_.set(byte(s.back()));
    overlap_ = std::max(overlap_, s.size() - 1);
  }
}

StopStrings::Hit StopStrings::find(std::string_view text, size_t start,
                                   std::string_view piece) const {
  Hit hit{0, -1};
  if (std::none_of(piece.begin(), piece.end(), [&](char c) { return lasts_[byte(c)]; })) return hit;
  size_t hit_end = 0;
  for (size_t i = 0; i < strings_.size(); ++i) {
    const size_t at = text.find(strings_[i], start);
    if (at == std::string_view::npos) continue;
    const size_t end = at + strings_[i].size();
    if (hit.index < 0 || end < hit_end || (end == hit_end && at < hit.at)) {
      hit = {at, static_cast<int>(i)};
      hit_end = end;
    }
  }
  return hit;
}

size_t StopStrings::held_back(std::string_view text) const {
  for (size_t length = std::min(overlap_, text.size()); length > 0; --length) {
    const std::string_view tail = text.substr(text.size() - length);
    if (!firsts_[byte(tail.front())]) continue;
    for (const std::string& s : strings_) {
      if (s.size() > length && s.compare(0, length, tail) == 0) return length;
    }
  }
  return 0;
}

StoppableText::StoppableText(std::shared_ptr<const StopStrings> stop, bool include_stop,
                             std::string text)
    : stop_(std::move(stop)),
      include_stop_(include_stop),
      text_(std::move(text)),
      searched_from_(text_.size()) {}

int StoppableText::extend(std::string_view piece, bool may_stop) {
  if (piece.empty() || finished_) return -1;
  const size_t before = text_.size();
  text_.append(piece);
  if (!may_stop) {
    searched_from_ = text_.size();
    return -1;
  }
  const size_t overlap = std::min(before, stop_->overlap());
  const auto hit = stop_->find(text_, std::max(searched_from_, before - overlap), piece);
  if (hit.index >= 0) {
    text_.resize(include_stop_ ? hit.at + (*stop_)[hit.index].size() : hit.at);
    finished_ = true;
  }
  return hit.index;
}

std::string_view StoppableText::take() {
  const size_t end = text_.size() - (finished_ ? 0 : stop_->held_back(text_));
  if (end <= shown_) return {};
  const size_t begin = std::exchange(shown_, end);
  return std::string_view(text_).substr(begin, end - begin);
}

}  // namespace pyengine::text

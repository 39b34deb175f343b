#include "sampling/history.h"

#include <algorithm>

namespace pyengine::sampling {

void TokenHistory::reset(const int32_t* tokens, int64_t n, int64_t num_prompt) {
  tokens_.assign(tokens, tokens + n);
  counts_.clear();
  index_.clear();
  for (int64_t i = 0; i < n; ++i) count_of(tokens[i]).num_new += i >= num_prompt;
}

void TokenHistory::append(int32_t token) {
  tokens_.push_back(token);
  ++count_of(token).num_new;
}

void TokenHistory::remove_last() {
  const int32_t token = tokens_.back();
  tokens_.pop_back();
  --count_of(token).num_new;
  // Whoever was new with this token is the last of the counts.
  if (counts_.back().id == token &&
      std::find(tokens_.begin(), tokens_.end(), token) == tokens_.end()) {
    counts_.pop_back();
    index_.erase(token);
  }
}

bool TokenHistory::ends_in(const int32_t* ids, int64_t n) const {
  const auto length = static_cast<int64_t>(tokens_.size());
  return n <= length && std::equal(ids, ids + n, tokens_.data() + (length - n));
}

void TokenHistory::completions(int32_t size, std::vector<int32_t>& out) const {
  const int64_t length = static_cast<int64_t>(tokens_.size());
  const int64_t known = int64_t{size} - 1;  // tokens of the n-gram that are there already
  if (known > length) return;
  const int32_t* data = tokens_.data();
  const int32_t* suffix = data + (length - known);
  for (int64_t i = 0; i + known < length; ++i) {
    if (std::equal(suffix, suffix + known, data + i)) out.push_back(data[i + known]);
  }
}

TokenCount& TokenHistory::count_of(int32_t token) {
  auto [entry, is_new] = index_.try_emplace(token, static_cast<int32_t>(counts_.size()));
  if (is_new) counts_.push_back({token, 0});
  return counts_[entry->second];
}

}  // namespace pyengine::sampling

#include "drafting/ngram.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "core/errors.h"

namespace pyengine::drafting {

namespace {

// Lengths of contexts: each at most one and a half times the one before, so that a repetition is
// recognised soon, and long ones cost little.
constexpr std::array<int, 11> kLengths = {1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 64};
constexpr uint64_t kEmptyHash[] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};  // of a view
constexpr uint32_t kAnyNumber = 0xffffffffu;                                   // no token

}  // namespace

void Followers::add(int32_t token) {
  ++total;
  if (token != tokens[0] || counts[0] == 0) {
    if (token != tokens[1]) {
      tokens[1] = token;
      counts[1] = 0;
    }
    if (++counts[1] < counts[0]) return;
    std::swap(tokens[0], tokens[1]);
    std::swap(counts[0], counts[1]);
  } else {
    ++counts[0];
  }
  if (counts[0] == std::numeric_limits<uint16_t>::max()) {
    counts[0] /= 2;
    counts[1] /= 2;
    total /= 2;
  }
}

const Followers* FollowerTable::find(uint64_t key) const {
  if (places_.empty()) return nullptr;
  const size_t mask = places_.size() - 1;
  for (size_t i = key & mask;; i = (i + 1) & mask) {
    if (places_[i].key == key) return &places_[i];
    if (places_[i].key == 0) return nullptr;
  }
}

Followers& FollowerTable::at(uint64_t key) {
  if (2 * (size_ + 1) > places_.size()) {
    std::vector<Followers> old(std::max<size_t>(64, 2 * places_.size()));
    old.swap(places_);
    const size_t mask = places_.size() - 1;
    for (const Followers& one : old) {
      if (one.key == 0) continue;
      size_t i = one.key & mask;
      while (places_[i].key != 0) i = (i + 1) & mask;
      places_[i] = one;
    }
  }
  const size_t mask = places_.size() - 1;
  size_t i = key & mask;
  while (places_[i].key != key && places_[i].key != 0) i = (i + 1) & mask;
  if (places_[i].key == 0) {
    places_[i].key = key;
    ++size_;
  }
  return places_[i];
}

const Followers* SharedFollowers::find(uint64_t key) const {
  const Followers* found = recent_.find(key);
  return found != nullptr ? found : older_.find(key);
}

void SharedFollowers::count_token() {
  if (++num_recent_ < std::max<int64_t>(1, max_tokens_ / 2)) return;
  older_ = std::exchange(recent_, FollowerTable());
  num_older_ = std::exchange(num_recent_, 0);
}

NumberTokens::NumberTokens(const std::vector<int32_t>& token_ids) {
  for (int32_t token : token_ids) {
    if (token < 0) {
      throw ConfigError("token ids must be 0 or positive, not " + std::to_string(token));
    }
    if (static_cast<size_t>(token) >= is_number_.size()) is_number_.resize(token + size_t{1});
    is_number_[token] = true;
  }
}

NgramDrafter::NgramDrafter(int min_length, int max_length, std::shared_ptr<SharedFollowers> shared,
                           std::shared_ptr<const NumberTokens> numbers)
    : shared_(std::move(shared)), numbers_(std::move(numbers)) {
  if (min_length < 1 || max_length < min_length || max_length > kMaxLength) {
    throw ConfigError("an n-gram drafter looks at 1 to " + std::to_string(kMaxLength) +
                      " tokens, not at " + std::to_string(min_length) + " to " +
                      std::to_string(max_length));
  }
  for (int length : kLengths) {
    if (length > min_length && length < max_length) lengths_.push_back(length);
  }
  lengths_.insert(lengths_.begin(), min_length);
  if (max_length > min_length) lengths_.push_back(max_length);
  // What is assumed before anything is known weighs as much as four guesses.
  constexpr float kWeight = 4;
  constexpr std::array<float, kAgreements> kTrust = {0.75f, 0.5f, 0.25f};
  for (int source = 0; source < 2; ++source) {
    for (int context = 0; context < num_contexts(); ++context) {
      const auto length = static_cast<float>(lengths_[context / kViews]);
      for (int count = 0; count < kCounts; ++count) {
        for (float trust : kTrust) {
          records_.push_back({kWeight * trust * length / (length + 2), kWeight});
        }
      }
    }
  }
}

void NgramDrafter::Record::count(bool was_right) {
  constexpr float kMost = 64;  // guesses: older ones count for less and less
  right += was_right ? 1.0f : 0.0f;
  all += 1.0f;
  if (all > kMost) {
    right *= 0.5f;
    all *= 0.5f;
  }
}

void NgramDrafter::hash(const int32_t* tokens, int64_t n, Keys& keys) const {
  uint64_t h[kViews] = {kEmptyHash[0], kEmptyHash[1]};
  bool has_number = false;
  int length = 0;
  for (size_t i = 0; i < lengths_.size(); ++i) {
    uint64_t* of_length = &keys[kViews * i];
    if (lengths_[i] > n) {
      std::fill_n(of_length, kViews, 0);
      continue;
    }
    for (; length < lengths_[i]; ++length) {
      const auto token = static_cast<uint32_t>(tokens[n - 1 - length]);
      const bool is_number = numbers_ != nullptr && numbers_->contains(tokens[n - 1 - length]);
      has_number = has_number || is_number;
      h[0] = (h[0] ^ token) * 0xd6e8feb86659fd93u;
      h[1] = (h[1] ^ (is_number ? kAnyNumber : token)) * 0xd6e8feb86659fd93u;
      for (uint64_t& each : h) each ^= each >> 32;
    }
    of_length[0] = (h[0] + static_cast<uint64_t>(length)) | 1;  // never 0
    of_length[1] = has_number ? (h[1] + static_cast<uint64_t>(length)) | 1 : 0;
  }
}

size_t NgramDrafter::kind(int source, int context, const Followers& followers) const {
  const int count = std::min<int>(followers.counts[0], kCounts) - 1;
  const int agreement = followers.counts[0] == followers.total        ? 0
                        : 2u * followers.counts[0] >= followers.total ? 1
                                                                      : 2;
  const auto at = static_cast<size_t>(source * num_contexts() + context);
  return (at * kCounts + static_cast<size_t>(count)) * kAgreements + static_cast<size_t>(agreement);
}

void NgramDrafter::extend(const int32_t* tokens, int64_t n) {
  Keys keys;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t token = tokens[i];
    hash(tokens_.data(), num_tokens(), keys);
    for (int context = 0; context < num_contexts(); ++context) {
      if (keys[context] == 0) continue;
      Followers& own = own_.at(keys[context]);
      if (own.total > 0) records_[kind(0, context, own)].count(own.tokens[0] == token);
      own.add(token);
      if (shared_ == nullptr) continue;
      const Followers* known = shared_->find(keys[context]);
      if (known != nullptr) {
        records_[kind(1, context, *known)].count(known->tokens[0] == token);
      }
      shared_->at(keys[context]).add(token);
    }
    if (shared_ != nullptr) shared_->count_token();
    tokens_.push_back(token);
  }
}

std::vector<Guess> NgramDrafter::draft(int64_t max_tokens, double least) const {
  std::vector<Guess> guesses;
  Keys keys;
  const int64_t looked_at = std::min<int64_t>(num_tokens(), lengths_.back());
  std::vector<int32_t> text(tokens_.end() - looked_at, tokens_.end());
  double all_before = 1.0;
  while (static_cast<int64_t>(guesses.size()) < max_tokens) {
    hash(text.data(), static_cast<int64_t>(text.size()), keys);
    int32_t token = -1;
    double best = 0;
    for (int context = num_contexts() - 1; context >= 0; --context) {  // of equals, the longest
      if (keys[context] == 0) continue;
      const Followers* sources[] = {own_.find(keys[context]),
                                    shared_ != nullptr ? shared_->find(keys[context]) : nullptr};
      for (int source = 0; source < 2; ++source) {
        if (sources[source] == nullptr) continue;
        const double share = records_[kind(source, context, *sources[source])].share();
        if (share <= best) continue;
        best = share;
        token = sources[source]->tokens[0];
      }
    }
    all_before *= best;
    if (token < 0 || all_before < least) break;
    guesses.push_back({token, all_before});
    text.push_back(token);
  }
  return guesses;
}

}  // namespace pyengine::drafting

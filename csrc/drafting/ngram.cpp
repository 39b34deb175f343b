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

NgramDrafter::NgramDrafter(int min_length, int max_length, std::shared_ptr<SharedFollowers> shared)
    : shared_(std::move(shared)) {
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
    for (int length : lengths_) {
      for (int count = 0; count < kCounts; ++count) {
        for (float trust : kTrust) {
          const float share = trust * static_cast<float>(length) / static_cast<float>(length + 2);
          records_.push_back({kWeight * share, kWeight});
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

int NgramDrafter::hash(const int32_t* tokens, int64_t n, uint64_t* keys) const {
  uint64_t h = 0x9e3779b97f4a7c15u;
  int found = 0, length = 0;
  for (int wanted : lengths_) {
    if (wanted > n) break;
    for (; length < wanted; ++length) {
      h = (h ^ static_cast<uint32_t>(tokens[n - 1 - length])) * 0xd6e8feb86659fd93u;
      h ^= h >> 32;
    }
    keys[found++] = (h + static_cast<uint64_t>(length)) | 1;  // never 0
  }
  return found;
}

size_t NgramDrafter::kind(int source, int length, const Followers& followers) const {
  const int count = std::min<int>(followers.counts[0], kCounts) - 1;
  const int agreement = followers.counts[0] == followers.total        ? 0
                        : 2u * followers.counts[0] >= followers.total ? 1
                                                                      : 2;
  const size_t at = static_cast<size_t>(source) * lengths_.size() + static_cast<size_t>(length);
  return (at * kCounts + static_cast<size_t>(count)) * kAgreements + static_cast<size_t>(agreement);
}

void NgramDrafter::extend(const int32_t* tokens, int64_t n) {
  std::array<uint64_t, kLengths.size() + 2> keys;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t token = tokens[i];
    const int found = hash(tokens_.data(), num_tokens(), keys.data());
    for (int length = 0; length < found; ++length) {
      Followers& own = own_.at(keys[length]);
      if (own.total > 0) records_[kind(0, length, own)].count(own.tokens[0] == token);
      own.add(token);
      if (shared_ == nullptr) continue;
      const Followers* known = shared_->find(keys[length]);
      if (known != nullptr) {
        records_[kind(1, length, *known)].count(known->tokens[0] == token);
      }
      shared_->at(keys[length]).add(token);
    }
    if (shared_ != nullptr) shared_->count_token();
    tokens_.push_back(token);
  }
}

std::vector<Guess> NgramDrafter::draft(int64_t max_tokens, double least) const {
  std::vector<Guess> guesses;
  std::array<uint64_t, kLengths.size() + 2> keys;
  const int64_t context = std::min<int64_t>(num_tokens(), lengths_.back());
  std::vector<int32_t> text(tokens_.end() - context, tokens_.end());
  double all_before = 1.0;
  while (static_cast<int64_t>(guesses.size()) < max_tokens) {
    const int found = hash(text.data(), static_cast<int64_t>(text.size()), keys.data());
    int32_t token = -1;
    double best = 0;
    for (int length = found - 1; length >= 0; --length) {  // of equals, the longest context
      const Followers* sources[] = {own_.find(keys[length]),
                                    shared_ != nullptr ? shared_->find(keys[length]) : nullptr};
      for (int source = 0; source < 2; ++source) {
        if (sources[source] == nullptr) continue;
        const double share = records_[kind(source, length, *sources[source])].share();
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

// Guesses at the next tokens of a text from what has followed the same tokens before: an n-gram
// model that learns as the text grows, and how far to trust its guesses.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace pyengine::drafting {

// What has followed one context.
struct Followers {
  uint64_t key = 0;  // hash of the context; 0: an empty place of the table
  // The token that came most often, the later of equals, and the last one that was another.
  std::array<int32_t, 2> tokens{};
  std::array<uint16_t, 2> counts{};
  uint32_t total = 0;

  void add(int32_t token);
};

// Followers by context: a hash table with open addressing. Two contexts of one hash share an entry,
// which can make a guess worse, never a text wrong.
class FollowerTable {
 public:
  const Followers* find(uint64_t key) const;
  Followers& at(uint64_t key);  // made empty where it is new
  size_t size() const { return size_; }

 private:
  std::vector<Followers> places_;  // a power of two, half full at most
  size_t size_ = 0;
};

// Followers in all texts of an engine, of about the last `max_tokens` tokens: when half of them
// have come, what is older than these is forgotten.
class SharedFollowers {
 public:
  explicit SharedFollowers(int64_t max_tokens) : max_tokens_(max_tokens) {}

  const Followers* find(uint64_t key) const;
  Followers& at(uint64_t key) { return recent_.at(key); }
  void count_token();
  int64_t num_tokens() const { return num_recent_ + num_older_; }

 private:
  FollowerTable recent_, older_;
  int64_t max_tokens_, num_recent_ = 0, num_older_ = 0;
};

// Which tokens are digits: contexts that differ in their numbers alone are alike in one respect.
class NumberTokens {
 public:
  explicit NumberTokens(const std::vector<int32_t>& token_ids);
  bool contains(int32_t token) const {
    return token >= 0 && static_cast<size_t>(token) < is_number_.size() && is_number_[token];
  }

 private:
  std::vector<bool> is_number_;  // by token id
};

struct Guess {
  int32_t token;
  double probability;  // that this and all guesses before it come
};

// One text. Contexts of several lengths guess at once, each as it is and, if there are numbers in
// it, with all numbers taken for one: what follows a number in a table does not depend on the
// number. The guess is that of the context that has been right most often when it was as sure as it
// is now.
class NgramDrafter {
 public:
  static constexpr int kMaxLength = 64;

  // Contexts of min_length to max_length tokens (1 to kMaxLength; not every length in between).
  // `shared`: also what followed in other texts, or null; `numbers`: null where none are known.
  NgramDrafter(int min_length, int max_length, std::shared_ptr<SharedFollowers> shared = nullptr,
               std::shared_ptr<const NumberTokens> numbers = nullptr);

  // The text goes on with tokens[0, n).
  void extend(const int32_t* tokens, int64_t n);

  // What comes next, at most `max_tokens` tokens, as long as the guess reaches `least`.
  std::vector<Guess> draft(int64_t max_tokens, double least) const;

  int64_t num_tokens() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  // How often guesses of one kind were right. Starts from an assumption; forgets slowly.
  struct Record {
    float right, all;
    double share() const { return double{right} / double{all}; }
    void count(bool was_right);
  };
  static constexpr int kCounts = 4, kAgreements = 3;
  static constexpr int kViews = 2;         // of a context: as it is, with all numbers alike
  static constexpr int kMaxContexts = 26;  // views of all lengths
  using Keys = std::array<uint64_t, kMaxContexts>;

  int num_contexts() const { return static_cast<int>(lengths_.size()) * kViews; }
  // keys[kViews length + view] of the contexts at the end of tokens[0, n), length an index of
  // lengths_; 0 where there is none.
  void hash(const int32_t* tokens, int64_t n, Keys& keys) const;
  size_t kind(int source, int context, const Followers& followers) const;

  std::vector<int> lengths_;  // rising
  std::vector<int32_t> tokens_;
  FollowerTable own_;
  std::shared_ptr<SharedFollowers> shared_;
  std::shared_ptr<const NumberTokens> numbers_;
  std::vector<Record> records_;  // by kind()
};

}  // namespace pyengine::drafting

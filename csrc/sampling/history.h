// The tokens of one sequence, as far as penalties and bans have to know them.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "sampling/params.h"
#include "sampling/plan.h"

namespace pyengine::sampling {

class TokenHistory {
 public:
  // The history that leads to tokens[0, n), of which the first num_prompt are the prompt's.
  void reset(const int32_t* tokens, int64_t n, int64_t num_prompt);
  void append(int32_t token);  // generated
  void remove_last();          // which was appended

  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<TokenCount>& counts() const { return counts_; }  // by first appearance

  // Whether the tokens end in ids[0, n).
  bool ends_in(const int32_t* ids, int64_t n) const;

  // Tokens that would complete an n-gram of `size` tokens that occurred before, appended to `out`.
  void completions(int32_t size, std::vector<int32_t>& out) const;

 private:
  TokenCount& count_of(int32_t token);

  std::vector<int32_t> tokens_;
  std::vector<TokenCount> counts_;
  std::unordered_map<int32_t, int32_t> index_;  // token id -> place in counts_
};

}  // namespace pyengine::sampling

#include "model/batch.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/errors.h"

namespace pyengine {

namespace {

std::string number(int64_t n) { return std::to_string(n); }

[[noreturn]] void refuse(const std::string& what) { throw RequestError("batch: " + what); }

void require_size(const char* name, size_t size, size_t expected, const char* meaning) {
  if (size != expected) {
    refuse(std::string(name) + " has " + number(size) + " entries, expected " + number(expected) +
           " (" + meaning + ")");
  }
}

}  // namespace

Batch::Batch(std::vector<int32_t> token_ids, std::vector<int32_t> positions,
             std::vector<int32_t> query_start, std::vector<int32_t> context_len,
             std::vector<int32_t> block_table, std::vector<int32_t> block_copies)
    : token_ids_(std::move(token_ids)),
      positions_(std::move(positions)),
      query_start_(std::move(query_start)),
      context_len_(std::move(context_len)),
      block_table_(std::move(block_table)),
      block_copies_(std::move(block_copies)) {
  const size_t seqs = context_len_.size();
  if (token_ids_.empty() || seqs == 0) refuse("it holds no tokens");
  require_size("positions", positions_.size(), token_ids_.size(), "one per token");
  require_size("query_start", query_start_.size(), seqs + 1, "one per sequence and one");
  if (block_table_.size() % seqs != 0) {
    refuse("block_table has " + number(block_table_.size()) + " entries, no multiple of the " +
           number(seqs) + " sequences");
  }
  if (block_copies_.size() % 2 != 0) refuse("block_copies holds an odd number of blocks");
  max_blocks_ = static_cast<int32_t>(block_table_.size() / seqs);
  if (query_start_.front() != 0 || query_start_.back() != num_tokens()) {
    refuse("query_start must run from 0 to the number of tokens, " + number(num_tokens()));
  }
  for (size_t b = 0; b < seqs; ++b) {
    auto seq = [&] { return "sequence " + number(b) + ": "; };
    const int32_t begin = query_start_[b], end = query_start_[b + 1];
    if (begin >= end) refuse(seq() + "it has no tokens in query_start");
    if (end > num_tokens()) refuse(seq() + "query_start exceeds the number of tokens");
    if (context_len_[b] < end - begin) {
      refuse(seq() + "context_len is " + number(context_len_[b]) + ", less than its " +
             number(end - begin) + " new tokens");
    }
    if (static_cast<int64_t>(max_blocks_) * kBlockTokens < context_len_[b]) {
      refuse(seq() + "context_len is " + number(context_len_[b]) + ", more than its " +
             number(max_blocks_) + " blocks hold");
    }
    for (int32_t t = begin; t < end; ++t) {
      if (positions_[t] != context_len_[b] - (end - t)) {
        refuse(seq() + "token " + number(t - begin) + " has position " + number(positions_[t]) +
               ", expected " + number(context_len_[b] - (end - t)) +
               ": the new tokens are the last ones of the context");
      }
    }
  }
}

ops::RaggedBatch Batch::view() const {
  ops::RaggedBatch view;
  view.token_ids = token_ids_.data();
  view.positions = positions_.data();
  view.query_start = query_start_.data();
  view.context_len = context_len_.data();
  view.block_table = block_table_.data();
  view.num_tokens = num_tokens();
  view.num_seqs = num_seqs();
  view.max_blocks = max_blocks_;
  return view;
}

void Batch::require_tokens(int32_t vocab_size, int32_t n_positions) const {
  for (int32_t t = 0; t < num_tokens(); ++t) {
    if (token_ids_[t] < 0 || token_ids_[t] >= vocab_size) {
      refuse("token id " + number(token_ids_[t]) + " at position " + number(positions_[t]) +
             " is outside the vocabulary of " + number(vocab_size));
    }
  }
  for (int32_t b = 0; b < num_seqs(); ++b) {
    if (context_len_[b] > n_positions) {
      refuse("sequence " + number(b) + ": context_len is " + number(context_len_[b]) +
             ", but the model has " + number(n_positions) + " positions");
    }
  }
}

void Batch::require_blocks(int32_t num_blocks, std::vector<uint8_t>& marks) const {
  auto require_block = [&](int32_t block, const std::string& where) {
    if (block < 0 || block >= num_blocks) {
      refuse(where + ": block " + number(block) + " does not exist, the cache has " +
             number(num_blocks));
    }
  };
  constexpr uint8_t kCopied = 1, kRead = 2, kWritten = 4;
  marks.assign(num_blocks, 0);
  for (int32_t i = 0; i < num_copies(); ++i) {
    const int32_t source = block_copies_[2 * i], target = block_copies_[2 * i + 1];
    require_block(source, "block_copies");
    require_block(target, "block_copies");
    marks[source] |= kRead;
    if (marks[target] & kCopied) refuse("block " + number(target) + " is copied to twice");
    marks[target] |= kCopied;
  }
  for (int32_t i = 0; i < num_copies(); ++i) {
    if ((marks[block_copies_[2 * i + 1]] & kRead) != 0) {
      refuse("block " + number(block_copies_[2 * i + 1]) + " is copied both from and to");
    }
  }
  for (int32_t b = 0; b < num_seqs(); ++b) {
    const int32_t* table = block_table_.data() + static_cast<int64_t>(b) * max_blocks_;
    const int32_t used = (context_len_[b] + kBlockTokens - 1) / kBlockTokens;
    for (int32_t i = 0; i < used; ++i) require_block(table[i], "block_table");
    const int32_t first_written =
        (context_len_[b] - (query_start_[b + 1] - query_start_[b])) / kBlockTokens;
    for (int32_t i = first_written; i < used; ++i) {
      if (marks[table[i]] & kWritten) {
        refuse("block " + number(table[i]) + " is written by sequence " + number(b) +
               " and by another place of the batch");
      }
      marks[table[i]] |= kWritten;
    }
  }
}

void ChosenRows::choose(const ops::RaggedBatch& batch, const int32_t* rows, int32_t num_rows) {
  rows_.assign(rows, rows + num_rows);
  std::sort(rows_.begin(), rows_.end());
  rows_.erase(std::unique(rows_.begin(), rows_.end()), rows_.end());
  auto first_at_least = [this](int32_t row) {
    return static_cast<int32_t>(std::lower_bound(rows_.begin(), rows_.end(), row) - rows_.begin());
  };
  index_.clear();
  for (int32_t r = 0; r < num_rows; ++r) index_.push_back(first_at_least(rows[r]));
  positions_.clear();
  for (int32_t row : rows_) positions_.push_back(batch.positions[row]);
  query_start_.clear();
  for (int32_t b = 0; b <= batch.num_seqs; ++b) {
    query_start_.push_back(first_at_least(batch.query_start[b]));
  }
}

ops::RaggedBatch ChosenRows::view(const ops::RaggedBatch& batch) const {
  ops::RaggedBatch chosen = batch;
  chosen.token_ids = nullptr;
  chosen.positions = positions_.data();
  chosen.query_start = query_start_.data();
  chosen.num_tokens = size();
  return chosen;
}

}  // namespace pyengine

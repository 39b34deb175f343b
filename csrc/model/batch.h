// The host side of one ragged batch: owns the arrays of ops::RaggedBatch and checks that they
// agree.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ops.h"

namespace pyengine {

class Batch {
 public:
  // Arrays as in ops::RaggedBatch, block_copies (2n,) source, destination, source, ... Throws
  // RequestError naming the sequence and the field that do not fit the others.
  Batch(std::vector<int32_t> token_ids, std::vector<int32_t> positions,
        std::vector<int32_t> query_start, std::vector<int32_t> context_len,
        std::vector<int32_t> block_table, std::vector<int32_t> block_copies);

  int32_t num_tokens() const { return static_cast<int32_t>(token_ids_.size()); }
  int32_t num_seqs() const { return static_cast<int32_t>(context_len_.size()); }
  int32_t num_copies() const { return static_cast<int32_t>(block_copies_.size() / 2); }
  const int32_t* block_copies() const { return block_copies_.data(); }
  int32_t context_len(int32_t seq) const { return context_len_[seq]; }
  int32_t last_row(int32_t seq) const { return query_start_[seq + 1] - 1; }
  ops::RaggedBatch view() const;

  // Checks against a model and a cache, to be made before any of their memory is touched: token ids
  // below vocab_size and positions below n_positions; blocks that exist, none written by two
  // sequences.
  void require_tokens(int32_t vocab_size, int32_t n_positions) const;
  // `marks` is scratch, (num_blocks,), kept by the caller.
  void require_blocks(int32_t num_blocks, std::vector<uint8_t>& marks) const;

 private:
  std::vector<int32_t> token_ids_, positions_, query_start_, context_len_, block_table_;
  std::vector<int32_t> block_copies_;
  int32_t max_blocks_ = 0;
};

// The rows of a batch that somebody reads, each once, in the order of the batch.
class ChosenRows {
 public:
  // `rows` (R,) of the batch in any order, any of them more than once.
  void choose(const ops::RaggedBatch& batch, const int32_t* rows, int32_t num_rows);

  int32_t size() const { return static_cast<int32_t>(rows_.size()); }
  const int32_t* rows() const { return rows_.data(); }
  // (R,) where each of the `rows` that were asked for is among rows().
  const int32_t* index() const { return index_.data(); }
  // `batch` with these tokens only; without token_ids.
  ops::RaggedBatch view(const ops::RaggedBatch& batch) const;

 private:
  std::vector<int32_t> rows_, index_, positions_, query_start_;
};

}  // namespace pyengine

// Who holds which block of the KV cache: reference counts, copy-on-write and the prefix index.
//
// A block is in exactly one of three places:
//   in use   reference count > 0
//   cached   reference count 0, but in the prefix index; evicted, oldest first, when blocks run out
//   free     neither
// The prefix index is a trie over blocks of 16 tokens, kept in one hash table: the key of an edge
// is (content id of the parent block, the 16 tokens), compared in full, so a hash collision cannot
// yield another text's keys and values. Content ids are never reused, so what hung below an evicted
// block can no longer be found and leaves in its turn. Knows nothing of devices or storage; not
// thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kv/layout.h"

namespace pyengine {

class BlockManager {
 public:
  // Throws ConfigError unless num_blocks is at least 1.
  BlockManager(int32_t num_blocks, bool enable_prefix_caching);

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t num_available() const { return static_cast<int32_t>(free_.size()) + num_cached_; }
  int32_t num_in_use() const { return num_blocks() - num_available(); }

  // Blocks of the longest cached prefix of tokens[0, n), one reference more on each; never all of a
  // prompt, because its last token has to be computed: at most (n - 1) / 16 blocks.
  std::vector<int32_t> match(const int32_t* tokens, int64_t n);

  // Private blocks, lowest free numbers first. Throws OutOfMemory, changing nothing, if too few are
  // left.
  std::vector<int32_t> allocate(int64_t count);

  void fork(const std::vector<int32_t>& blocks);
  // `blocks` in the order of the sequence: its last blocks are evicted before its first.
  void free(const std::vector<int32_t>& blocks);

  // The block if the caller alone holds it and it is not indexed; else a new one, in exchange for
  // the caller's reference, into which the caller must copy the content.
  int32_t make_writable(int32_t block);

  // Index the full blocks among tokens[0, n), whose keys and values are computed. Where another
  // block already holds the same prefix, that one stays the one to be found.
  void publish(const int32_t* tokens, int64_t n, const std::vector<int32_t>& blocks);

  int32_t reference_count(int32_t block) const { return at(block).references; }
  void reset_prefix_cache();

  // Throws InternalError saying what is wrong if the books do not balance. O(blocks); for tests.
  void check_invariants() const;

 private:
  static constexpr int32_t kNone = -1;
  static constexpr uint64_t kRoot = 0;  // content id of the empty prefix

  struct Key {
    uint64_t parent = kRoot;
    std::array<int32_t, kBlockTokens> tokens{};
    bool operator==(const Key& o) const { return parent == o.parent && tokens == o.tokens; }
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Block {
    int32_t references = 0;
    int32_t older = kNone, newer = kNone;  // neighbours among the cached blocks
    uint64_t content = kRoot;              // content id; kRoot: not indexed
    const Key* key = nullptr;              // lives in index_; null: not indexed
  };

  const Block& at(int32_t block) const;
  Block& at(int32_t block) { return const_cast<Block&>(std::as_const(*this).at(block)); }
  void add_reference(int32_t block);
  void drop_reference(int32_t block);
  int32_t take_block();  // the caller has checked that one is available
  void unindex(Block& block);
  void push_free(int32_t block);
  void push_newest(int32_t block);
  void unlink(Block& block);

  bool caching_;
  uint64_t next_content_ = kRoot + 1;
  std::vector<Block> blocks_;
  std::vector<int32_t>
      free_;  // a heap, lowest number on top: memory is first touched as late as can be
  int32_t num_cached_ = 0;
  int32_t oldest_ = kNone, newest_ = kNone;
  std::unordered_map<Key, int32_t, KeyHash> index_;
};

}  // namespace pyengine

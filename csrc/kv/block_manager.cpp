#include "kv/block_manager.h"

#include <algorithm>
#include <functional>
#include <string>

#include "core/errors.h"

namespace pyengine {

namespace {

std::string number(int64_t n) { return std::to_string(n); }

}  // namespace

size_t BlockManager::KeyHash::operator()(const Key& key) const {
  // Multiply and fold (as in wyhash) two tokens at a time.
  uint64_t h = key.parent ^ 0x9e3779b97f4a7c15u;
  for (int i = 0; i < kBlockTokens; i += 2) {
    uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(key.tokens[i])) << 32 |
                    static_cast<uint32_t>(key.tokens[i + 1]);
    h = (h ^ pair) * 0xd6e8feb86659fd93u;
    h ^= h >> 32;
  }
  return h;
}

BlockManager::BlockManager(int32_t num_blocks, bool enable_prefix_caching)
    : caching_(enable_prefix_caching) {
  if (num_blocks < 1) {
    throw ConfigError("num_blocks is " + number(num_blocks) +
                      ", but a KV cache needs at least 1 block");
  }
  blocks_.resize(num_blocks);
  free_.resize(num_blocks);
  for (int32_t i = 0; i < num_blocks; ++i) free_[i] = i;  // ascending: already a heap
}

const BlockManager::Block& BlockManager::at(int32_t block) const {
  if (block < 0 || block >= num_blocks()) {
    throw InternalError("block " + number(block) + " does not exist: there are " +
                        number(num_blocks()));
  }
  return blocks_[block];
}

std::vector<int32_t> BlockManager::match(const int32_t* tokens, int64_t n) {
  std::vector<int32_t> found;
  if (!caching_) return found;
  Key key;
  for (int64_t end = kBlockTokens; end < n; end += kBlockTokens) {
    std::copy_n(tokens + end - kBlockTokens, kBlockTokens, key.tokens.begin());
    auto hit = index_.find(key);
    if (hit == index_.end()) break;
    add_reference(hit->second);
    found.push_back(hit->second);
    key.parent = blocks_[hit->second].content;
  }
  return found;
}

std::vector<int32_t> BlockManager::allocate(int64_t count) {
  if (count < 0) throw InternalError("allocate(" + number(count) + "): the count is negative");
  if (count > num_available()) {
    throw OutOfMemory("the KV cache has " + number(num_available()) + " of " +
                      number(num_blocks()) + " blocks left, but " + number(count) +
                      " are needed; a larger kv_cache_memory or fewer sequences at once help");
  }
  std::vector<int32_t> taken(count);
  for (int32_t& block : taken) block = take_block();
  return taken;
}

void BlockManager::fork(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) {
    if (at(block).references == 0) {
      throw InternalError("fork: block " + number(block) + " is held by nobody");
    }
  }
  for (int32_t block : blocks) add_reference(block);
}

void BlockManager::free(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) {
    if (at(block).references == 0) {
      throw InternalError("free: block " + number(block) + " is held by nobody");
    }
  }
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) drop_reference(*block);
}

int32_t BlockManager::make_writable(int32_t block) {
  const Block& b = at(block);
  if (b.references == 0) {
    throw InternalError("make_writable: block " + number(block) + " is held by nobody");
  }
  if (b.references == 1 && b.key == nullptr) return block;
  int32_t copy = allocate(1)[0];
  drop_reference(block);
  return copy;
}

void BlockManager::publish(const int32_t* tokens, int64_t n, const std::vector<int32_t>& blocks) {
  if (!caching_) return;
  int64_t full = n / kBlockTokens;
  if (static_cast<int64_t>(blocks.size()) < full) {
    throw InternalError("publish: " + number(n) + " tokens fill " + number(full) +
                        " blocks, but only " + number(blocks.size()) + " are given");
  }
  for (int64_t i = 0; i < full; ++i) {
    if (at(blocks[i]).references == 0) {
      throw InternalError("publish: block " + number(blocks[i]) + " is held by nobody");
    }
  }
  Key key;
  for (int64_t i = 0; i < full; ++i) {
    std::copy_n(tokens + i * kBlockTokens, kBlockTokens, key.tokens.begin());
    auto [entry, is_new] = index_.try_emplace(key, blocks[i]);
    if (is_new) {
      Block& block = blocks_[blocks[i]];
      // It may hang below a prefix that was evicted and has been computed again since.
      if (block.key != nullptr) unindex(block);
      block.key = &entry->first;
      block.content = next_content_++;
    }
    key.parent = blocks_[entry->second].content;
  }
}

void BlockManager::reset_prefix_cache() {
  while (oldest_ != kNone) {
    int32_t block = oldest_;
    unlink(blocks_[block]);
    unindex(blocks_[block]);
    push_free(block);
  }
  for (Block& block : blocks_) {
    if (block.key != nullptr) unindex(block);
  }
}

void BlockManager::add_reference(int32_t block) {
  Block& b = blocks_[block];
  if (b.references++ == 0) unlink(b);  // only cached blocks are found with no reference
}

void BlockManager::drop_reference(int32_t block) {
  Block& b = at(block);
  if (b.references == 0) {
    throw InternalError("free: block " + number(block) + " is given more often than it is held");
  }
  if (--b.references > 0) return;
  if (b.key != nullptr) {
    push_newest(block);
  } else {
    push_free(block);
  }
}

int32_t BlockManager::take_block() {
  int32_t block;
  if (!free_.empty()) {
    std::pop_heap(free_.begin(), free_.end(), std::greater<int32_t>());
    block = free_.back();
    free_.pop_back();
  } else {
    block = oldest_;
    unlink(blocks_[block]);
    unindex(blocks_[block]);
  }
  blocks_[block].references = 1;
  return block;
}

void BlockManager::unindex(Block& block) {
  index_.erase(index_.find(*block.key));
  block.key = nullptr;
  block.content = kRoot;
}

void BlockManager::push_free(int32_t block) {
  free_.push_back(block);
  std::push_heap(free_.begin(), free_.end(), std::greater<int32_t>());
}

void BlockManager::push_newest(int32_t block) {
  Block& b = blocks_[block];
  b.older = newest_;
  b.newer = kNone;
  (newest_ == kNone ? oldest_ : blocks_[newest_].newer) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockManager::unlink(Block& b) {
  (b.older == kNone ? oldest_ : blocks_[b.older].newer) = b.newer;
  (b.newer == kNone ? newest_ : blocks_[b.newer].older) = b.older;
  b.older = b.newer = kNone;
  --num_cached_;
}

void BlockManager::check_invariants() const {
  auto require = [](bool ok, const std::string& what) {
    if (!ok) throw InternalError("block manager: " + what);
  };
  enum Place : uint8_t { nowhere, is_free, is_cached };
  std::vector<Place> place(blocks_.size(), nowhere);
  require(std::is_heap(free_.begin(), free_.end(), std::greater<int32_t>()),
          "the free blocks are no heap");
  for (int32_t block : free_) {
    at(block);
    require(place[block] == nowhere, "block " + number(block) + " is free twice");
    place[block] = is_free;
  }
  int32_t cached = 0;
  int32_t older = kNone;
  for (int32_t block = oldest_; block != kNone; block = blocks_[block].newer) {
    at(block);
    require(place[block] == nowhere, "cached block " + number(block) + " is listed elsewhere too");
    require(blocks_[block].older == older, "the list of cached blocks is torn at " + number(block));
    require(blocks_[block].key != nullptr, "cached block " + number(block) + " is not indexed");
    place[block] = is_cached;
    older = block;
    ++cached;
  }
  require(newest_ == older && cached == num_cached_, "the count of cached blocks is wrong");
  size_t indexed = 0;
  for (int32_t i = 0; i < num_blocks(); ++i) {
    const Block& b = blocks_[i];
    require(b.references >= 0, "block " + number(i) + " has a negative reference count");
    require((b.references > 0) == (place[i] == nowhere),
            "block " + number(i) + " with " + number(b.references) +
                (place[i] == nowhere ? " references is lost" : " references is free or cached"));
    require((b.key != nullptr) == (b.content != kRoot), "block " + number(i) + " is half indexed");
    if (b.key == nullptr) continue;
    ++indexed;
    require(place[i] != is_free, "free block " + number(i) + " is indexed");
    auto entry = index_.find(*b.key);
    require(entry != index_.end() && entry->second == i && &entry->first == b.key,
            "block " + number(i) + " is indexed under another's key");
  }
  require(indexed == index_.size(), "the prefix index holds blocks that do not know of it");
}

}  // namespace pyengine

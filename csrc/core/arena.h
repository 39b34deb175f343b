// Scratch memory of one ExecContext: grows to what the largest step needs and is then reused.
//
// An op opens an ArenaScope, takes what it needs before it starts its workers, and the scope gives
// it all back. Pointers stay valid until then, also when the arena has to grow in between. Not
// thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/memory.h"

namespace pyengine {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `n` elements, uninitialised, 64-byte aligned, until the innermost open ArenaScope ends.
  template <class T>
  T* take(int64_t n) {
    static_assert(std::is_trivially_destructible<T>::value, "the arena runs no destructors");
    return static_cast<T*>(take_bytes(static_cast<size_t>(n) * sizeof(T)));
  }

  size_t capacity() const {
    size_t total = 0;
    for (const AlignedBuffer& chunk : chunks_) total += chunk.size();
    return total;
  }

 private:
  friend class ArenaScope;

  struct Mark {
    size_t chunk = 0;
    size_t offset = 0;
  };

  void* take_bytes(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (top_.chunk == 0 && top_.offset == 0 && chunks_.size() > 1) {
      // Nothing is in use: one chunk of the whole size serves this step without gaps. Here, not
      // where the memory is given back: a destructor may not throw OutOfMemory.
      const size_t total = capacity() > bytes ? capacity() : bytes;
      chunks_.clear();
      chunks_.emplace_back(total);
    }
    while (top_.chunk < chunks_.size() && chunks_[top_.chunk].size() - top_.offset < bytes) {
      top_ = {top_.chunk + 1, 0};
    }
    if (top_.chunk == chunks_.size()) {
      // Doubling keeps the number of chunks, and so the number of growing steps, small.
      size_t size = capacity() > bytes ? capacity() : bytes;
      chunks_.emplace_back(size > kFirstChunk ? size : kFirstChunk);
    }
    void* p = chunks_[top_.chunk].bytes() + top_.offset;
    top_.offset += bytes;
    return p;
  }

  void release_to(Mark mark) noexcept { top_ = mark; }

  static constexpr size_t kAlignment = AlignedBuffer::kAlignment;
  static constexpr size_t kFirstChunk = size_t{1} << 18;

  std::vector<AlignedBuffer> chunks_;
  Mark top_;
};

class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.top_) {}
  ~ArenaScope() { arena_.release_to(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace pyengine

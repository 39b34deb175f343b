// Owned, 64-byte-aligned, uninitialised memory.
#pragma once

#include <cstddef>
#include <utility>

namespace pyengine {

class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;  // one cache line, one 512-bit vector

  AlignedBuffer() = default;
  // Throws OutOfMemory. From kHugeBytes on the memory is a mapping of its own with huge pages
  // requested: a page fault per 4 KB costs more than what is computed on it.
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer() { reset(); }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  void* data() const { return data_; }
  std::byte* bytes() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHugeBytes = size_t{4} << 20;

  void reset() noexcept;
  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

// An anonymous mapping of zero pages of 4 KB that cost nothing until they are touched.
class LazyMapping {
 public:
  LazyMapping() = default;
  explicit LazyMapping(size_t bytes);  // throws OutOfMemory
  ~LazyMapping();
  LazyMapping(LazyMapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  LazyMapping& operator=(LazyMapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  LazyMapping(const LazyMapping&) = delete;
  LazyMapping& operator=(const LazyMapping&) = delete;

  std::byte* bytes() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pyengine

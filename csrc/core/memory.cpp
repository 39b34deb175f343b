#include "core/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <string>

#include "core/errors.h"

namespace pyengine {

namespace {

void* map_anonymous(size_t bytes, const char* what) {
  // NORESERVE: a cache sized for the largest load must not fail under strict overcommit accounting.
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    throw OutOfMemory("cannot map " + std::to_string(bytes) + " bytes for " + what +
                      ": the machine or a memory limit (ulimit -v, cgroup) refuses it");
  }
  return p;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes >= kHugeBytes) {
    data_ = map_anonymous(bytes, "a buffer");
    madvise(data_, bytes, MADV_HUGEPAGE);  // advice: refusing it is not an error
    return;
  }
  size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  data_ = std::aligned_alloc(kAlignment, rounded > 0 ? rounded : kAlignment);
  if (data_ == nullptr) {
    throw OutOfMemory("cannot allocate " + std::to_string(bytes) + " bytes");
  }
}

void AlignedBuffer::reset() noexcept {
  if (data_ == nullptr) return;
  if (size_ >= kHugeBytes) {
    munmap(data_, size_);
  } else {
    std::free(data_);
  }
  data_ = nullptr;
  size_ = 0;
}

LazyMapping::LazyMapping(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  data_ = map_anonymous(bytes, "the KV cache");
  madvise(data_, bytes, MADV_NOHUGEPAGE);  // a kernel without huge pages refuses: no error
}

LazyMapping::~LazyMapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace pyengine

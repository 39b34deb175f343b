// Memory mapped from a file that somebody may truncate or overwrite while it is read.
//
// Reading a page that the file no longer has raises SIGBUS, which ends the process. Inside memory
// that a FileGuard watches, a handler puts zeros in the place of such pages and remembers it; who
// has read the memory asks check() before believing what came of it. SIGBUS elsewhere is left to
// whoever handled it before (faulthandler, a sanitizer, the system).
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <string>

namespace pyengine {

class FileGuard {
 public:
  // Watches [data, data + bytes), mapped from the file open as `fd`, which is duplicated. `path`
  // names it in errors. Throws CheckpointError.
  FileGuard(const void* data, size_t bytes, int fd, std::string path);
  ~FileGuard();
  FileGuard(const FileGuard&) = delete;
  FileGuard& operator=(const FileGuard&) = delete;

  // Throws CheckpointError if the file has been truncated or written to since, or could not be
  // read: what came of the memory is worthless, and will be from now on.
  void check() const;

  // The guard that watches this address, null if none does. It must be kept alive by other means.
  static const FileGuard* find(const void* address);

  struct Range;  // what the signal handler knows of a guard

 private:
  std::string path_;
  int fd_ = -1;
  struct stat opened_{};
  Range* range_ = nullptr;
};

}  // namespace pyengine

#include "core/file_guard.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>

#include "core/errors.h"

namespace pyengine {

// The handler may take no lock, so ranges are never freed, only used again.
struct FileGuard::Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: unused
  std::atomic<bool> lost{false};
  const FileGuard* owner = nullptr;  // for guards, under `mutex`; not for the handler
  Range* next = nullptr;

  bool holds(uintptr_t address) const {
    return address < end.load(std::memory_order_acquire) &&
           address >= begin.load(std::memory_order_relaxed);
  }
};

namespace {

std::mutex mutex;  // of the list and of installing; the handler goes without
std::atomic<FileGuard::Range*> ranges{nullptr};
std::atomic<bool> has_previous{false};
struct sigaction previous{};
uintptr_t page_size = 0;

// Async-signal-safe: atomic loads and stores, and mmap, which is a bare system call.
bool put_zeros_at(uintptr_t address) {
  for (FileGuard::Range* r = ranges.load(std::memory_order_acquire); r != nullptr; r = r->next) {
    if (!r->holds(address)) continue;
    // To the end: the file has lost all that follows, too, and a mapping for each page would run
    // into the system's limit of mappings.
    const uintptr_t begin = address / page_size * page_size;
    const uintptr_t end = r->end.load(std::memory_order_relaxed);
    const size_t bytes = (end - begin + page_size - 1) / page_size * page_size;
    r->lost.store(true, std::memory_order_release);
    return mmap(reinterpret_cast<void*>(begin), bytes, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
  }
  return false;
}

void handle(int signal, siginfo_t* info, void*) {
  const int saved_errno = errno;
  const bool fault = info->si_code == BUS_ADRERR || info->si_code == BUS_OBJERR;
  if (!fault || !put_zeros_at(reinterpret_cast<uintptr_t>(info->si_addr))) {
    // Not ours: the instruction faults again, now in the hands of whoever was here before. Once:
    // a handler installed after ours may have ours for its own predecessor.
    struct sigaction other{};
    other.sa_handler = SIG_DFL;
    if (has_previous.exchange(false)) other = previous;
    sigaction(signal, &other, nullptr);
    if (info->si_code <= 0) raise(signal);  // sent, not a fault: nothing would send it again
  }
  errno = saved_errno;
}

// Puts the handler in front of whatever handles SIGBUS now; with `mutex` held.
void install() {
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction current{};
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == handle) return;
  struct sigaction ours{};
  ours.sa_sigaction = handle;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  previous = current;
  has_previous.store(true);
  sigaction(SIGBUS, &ours, nullptr);
}

bool same_time(const struct stat& a, const struct stat& b) {
#ifdef __APPLE__
  return a.st_mtimespec.tv_sec == b.st_mtimespec.tv_sec &&
         a.st_mtimespec.tv_nsec == b.st_mtimespec.tv_nsec;
#else
  return a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
#endif
}

}  // namespace

FileGuard::FileGuard(const void* data, size_t bytes, int fd, std::string path)
    : path_(std::move(path)), fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
  if (fd_ < 0 || fstat(fd_, &opened_) != 0) {
    const std::string reason = std::strerror(errno);
    if (fd_ >= 0) close(fd_);
    throw CheckpointError("cannot watch " + path_ + ": " + reason);
  }
  if (static_cast<size_t>(opened_.st_size) < bytes) {
    close(fd_);
    throw CheckpointError(path_ +
                          " was truncated while it was opened: load it once it is complete");
  }
  std::lock_guard<std::mutex> lock(mutex);
  install();
  Range* range = ranges.load();
  while (range != nullptr && range->owner != nullptr) range = range->next;
  if (range == nullptr) {
    range = new Range;
    range->next = ranges.load();
    ranges.store(range, std::memory_order_release);
  }
  range->owner = this;
  range->lost.store(false);
  range->begin.store(reinterpret_cast<uintptr_t>(data));
  range->end.store(reinterpret_cast<uintptr_t>(data) + bytes, std::memory_order_release);
  range_ = range;
}

FileGuard::~FileGuard() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    range_->end.store(0);
    range_->owner = nullptr;
  }
  close(fd_);
}

void FileGuard::check() const {
  struct stat now{};
  const bool known = fstat(fd_, &now) == 0;
  const char* fault = nullptr;
  if (known && now.st_size < opened_.st_size) {
    fault = "was truncated";
  } else if (known && (now.st_size != opened_.st_size || !same_time(now, opened_))) {
    fault = "was written to";
  } else if (range_->lost.load(std::memory_order_acquire)) {
    fault = "could not be read (by a failing disk or network, perhaps)";
  }
  if (fault == nullptr) return;
  throw CheckpointError(path_ + " " + fault +
                        " while it was in use, so its weights are no longer those that were "
                        "loaded: load the checkpoint again. Write a new version under "
                        "another name and rename it, which disturbs nobody");
}

const FileGuard* FileGuard::find(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Range* r = ranges.load(); r != nullptr; r = r->next) {
    if (r->owner != nullptr && r->holds(reinterpret_cast<uintptr_t>(address))) return r->owner;
  }
  return nullptr;
}

}  // namespace pyengine

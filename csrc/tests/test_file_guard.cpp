// Files that are truncated or written to while they are mapped.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include "core/errors.h"
#include "core/file_guard.h"
#include "core/thread_pool.h"
#include "tests/check.h"

using pyengine::CheckpointError;
using pyengine::FileGuard;
using pyengine::ThreadPool;

namespace {

constexpr size_t kBytes = size_t{256} << 12;

// A file of ones, mapped as a checkpoint is.
class MappedFile {
 public:
  MappedFile() {
    char name[] = "/tmp/pyengine_test_XXXXXX";
    fd_ = mkstemp(name);
    path = name;
    const std::string ones(kBytes, '\1');
    if (fd_ < 0 || write(fd_, ones.data(), kBytes) != static_cast<ssize_t>(kBytes)) std::abort();
    void* p = mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, fd_, 0);
    if (p == MAP_FAILED) std::abort();
    data = static_cast<const volatile char*>(p);
  }
  ~MappedFile() {
    munmap(address(), kBytes);
    close(fd_);
    unlink(path.c_str());
  }
  void* address() const { return const_cast<char*>(data); }
  int fd() const { return fd_; }
  void truncate(size_t bytes) {
    if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) std::abort();
  }

  std::string path;
  const volatile char* data = nullptr;

 private:
  int fd_ = -1;
};

// The signal that ends a child process which runs `f`, 0 if none.
template <class F>
int signal_of_child(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

}  // namespace

TEST(a_file_that_stays_as_it_is) {
  MappedFile file;
  FileGuard guard(file.address(), kBytes, file.fd(), file.path);
  CHECK_EQ(int{file.data[kBytes - 1]}, 1);
  guard.check();
}

TEST(a_truncated_file_reads_as_zeros_on_every_thread) {
  ThreadPool pool(4);
  MappedFile file;
  FileGuard guard(file.address(), kBytes, file.fd(), file.path);
  file.truncate(kBytes / 2);
  std::atomic<int> sum{0};
  // Workers that wake late may read nothing: enough rounds that they, too, meet lost pages.
  pool.parallel_for(256, [&](int64_t page, int) { sum += file.data[(255 - page) << 12]; });
  CHECK_EQ(sum.load(), 128);
  CHECK_THROWS(guard.check(), CheckpointError, file.path + " was truncated while it was in use");
  CHECK_THROWS(guard.check(), CheckpointError, "load the checkpoint again");
}

TEST(a_fault_is_remembered_when_the_file_has_its_size_again) {
  MappedFile file;
  FileGuard guard(file.address(), kBytes, file.fd(), file.path);
  file.truncate(0);
  CHECK_EQ(int{file.data[0]}, 0);
  file.truncate(kBytes);
  CHECK_THROWS(guard.check(), CheckpointError, "while it was in use");
}

TEST(a_file_that_was_written_to) {
  MappedFile file;
  FileGuard guard(file.address(), kBytes, file.fd(), file.path);
  usleep(20000);  // more than a tick of the clock that stamps files
  CHECK_EQ(pwrite(file.fd(), "x", 1, 0), ssize_t{1});
  CHECK_THROWS(guard.check(), CheckpointError, "was written to while it was in use");
}

TEST(a_file_cut_before_it_is_watched) {
  MappedFile file;
  file.truncate(kBytes - 1);
  CHECK_THROWS(FileGuard(file.address(), kBytes, file.fd(), file.path), CheckpointError,
               "truncated while it was opened");
}

TEST(guards_are_found_by_address_and_ranges_used_again) {
  MappedFile first, second;
  auto guard = std::make_unique<FileGuard>(first.address(), kBytes, first.fd(), "first");
  auto* begin = static_cast<char*>(first.address());
  CHECK(FileGuard::find(begin) == guard.get());
  CHECK(FileGuard::find(begin + kBytes - 1) == guard.get());
  CHECK(FileGuard::find(begin + kBytes) != guard.get());
  CHECK(FileGuard::find(second.address()) == nullptr);
  first.truncate(0);
  CHECK_EQ(int{first.data[0]}, 0);
  guard.reset();
  CHECK(FileGuard::find(begin) == nullptr);
  FileGuard again(second.address(), kBytes, second.fd(), "second");
  CHECK(FileGuard::find(second.address()) == &again);
  again.check();
}

// Sanitizers have handlers of their own for what follows.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

TEST(other_faults_end_the_process_as_before) {
  MappedFile watched, other;
  FileGuard guard(watched.address(), kBytes, watched.fd(), watched.path);
  CHECK_EQ(signal_of_child([&] {
             other.truncate(0);
             (void)other.data[0];
           }),
           SIGBUS);
  CHECK_EQ(signal_of_child([&] { raise(SIGBUS); }), SIGBUS);
}

TEST(other_faults_reach_the_handler_that_was_there_before) {
  const int ended_by = signal_of_child([] {
    signal(SIGBUS, [](int) { _exit(42); });  // not seen as a signal
    MappedFile watched, other;
    FileGuard guard(watched.address(), kBytes, watched.fd(), watched.path);
    other.truncate(0);
    (void)other.data[0];
    raise(SIGKILL);
  });
  CHECK_EQ(ended_by, 0);
}

TEST(two_handlers_that_name_each_other_end_the_process) {
  const int ended_by = signal_of_child([] {
    static struct sigaction ours;
    MappedFile watched, other;
    FileGuard first(watched.address(), kBytes, watched.fd(), watched.path);
    sigaction(SIGBUS, nullptr, &ours);
    signal(SIGBUS, [](int signal) { sigaction(signal, &ours, nullptr); });
    FileGuard second(watched.address(), kBytes, watched.fd(), watched.path);
    other.truncate(0);
    (void)other.data[0];
    _exit(1);
  });
  CHECK_EQ(ended_by, SIGBUS);
}

#endif

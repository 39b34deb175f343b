#include "core/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu_count.h"
#include "core/errors.h"

namespace pyengine {

namespace {

// Longer than the gap between two ops of a step, much shorter than the gap between two requests.
constexpr auto kSpin = std::chrono::microseconds(50);
// With more threads than processors a spinning thread keeps a working one from its processor.
constexpr auto kSpinOversubscribed = std::chrono::microseconds(1);

void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Number of forks that lie between the first process and this one. A counter is read for nothing,
// where getpid() would be a system call in every loop.
std::atomic<int> fork_count{0};

void count_forks() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
}

// The state of a loop in one word: epoch (which loop) | open (may workers join?) | workers inside.
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kWorkersMask = kOpen - 1;
constexpr uint64_t epoch_of(uint64_t state) { return state >> 32; }

}  // namespace

struct ThreadPool::Shared {
  // The loop: written by the caller while no worker is inside, read by workers that have joined.
  Task task = nullptr;
  void* fn = nullptr;
  int64_t n = 0;
  std::chrono::microseconds spin{0};
  int forks = 0;

  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};
  std::atomic<bool> busy{false};

  std::mutex mutex;  // guards the two condition variables and `error`
  std::condition_variable work;
  std::condition_variable done;
  std::exception_ptr error;

  std::vector<std::thread> threads;

  void work_through(int worker) {
    // A copy on the stack: the loop must not reload these after every call.
    const Task run_one = task;
    void* const f = fn;
    const int64_t count = n;
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        run_one(f, i, worker);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      next.store(count, std::memory_order_relaxed);
    }
  }

  // True once the worker is inside a loop that it has not seen; false when the pool shuts down.
  bool join_next_loop(uint64_t& seen) {
    auto joinable = [&](uint64_t s) { return (s & kOpen) != 0 && epoch_of(s) != seen; };
    auto spin_until = std::chrono::steady_clock::now() + spin;
    for (int i = 0; !stop.load(std::memory_order_relaxed); ++i) {
      uint64_t s = state.load(std::memory_order_acquire);
      if (joinable(s)) {
        // Acquires what the caller wrote before it opened the loop.
        if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) {
          seen = epoch_of(s);
          return true;
        }
        continue;
      }
      cpu_relax();
      if (i % 16 != 15 || std::chrono::steady_clock::now() < spin_until) continue;
      std::unique_lock<std::mutex> lock(mutex);
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      work.wait(lock, [&] {
        return stop.load(std::memory_order_relaxed) ||
               joinable(state.load(std::memory_order_seq_cst));
      });
      sleepers.fetch_sub(1, std::memory_order_relaxed);
      spin_until = std::chrono::steady_clock::now() + spin;
    }
    return false;
  }

  void worker_main(int worker) {
    uint64_t seen = 0;
    while (join_next_loop(seen)) {
      work_through(worker);
      uint64_t before = state.fetch_sub(1, std::memory_order_seq_cst);
      if ((before & (kOpen | kWorkersMask)) == 1 && caller_sleeps.load(std::memory_order_seq_cst)) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  void open_loop() {
    uint64_t epoch = (epoch_of(state.load(std::memory_order_relaxed)) + 1) & 0xffffffff;
    if (epoch == 0) epoch = 1;  // 0 is what a new worker has seen
    state.store(epoch << 32 | kOpen, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
    // The lock closes the window in which a worker has looked but does not wait yet.
    {
      std::lock_guard<std::mutex> lock(mutex);
    }
    if (n > 2) {
      work.notify_all();
    } else {
      work.notify_one();
    }
  }

  void close_loop() {
    uint64_t inside = state.fetch_and(~kOpen, std::memory_order_acq_rel) & kWorkersMask;
    if (inside == 0) return;
    auto finished = [&] { return (state.load(std::memory_order_seq_cst) & kWorkersMask) == 0; };
    auto spin_until = std::chrono::steady_clock::now() + spin;
    for (int i = 0; !finished(); ++i) {
      cpu_relax();
      if (i % 16 != 15 || std::chrono::steady_clock::now() < spin_until) continue;
      std::unique_lock<std::mutex> lock(mutex);
      caller_sleeps.store(true, std::memory_order_seq_cst);
      done.wait(lock, finished);
      caller_sleeps.store(false, std::memory_order_relaxed);
      return;
    }
  }

  void shut_down() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop.store(true, std::memory_order_relaxed);
    }
    work.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads == 0 ? usable_cpus() : num_threads) {
  if (num_threads < 0 || num_threads > kMaxThreads) {
    throw ConfigError("num_threads is " + std::to_string(num_threads) +
                      ", but must be 0 (all) to " + std::to_string(kMaxThreads));
  }
  count_forks();
  shared_ = new Shared;
  shared_->forks = fork_count.load(std::memory_order_relaxed);
  shared_->spin = num_threads_ > usable_cpus() ? kSpinOversubscribed : kSpin;
  // Workers must leave signals to the thread that Python expects them on, but for those that a
  // fault of their own raises: blocked, these would end the process past its handlers.
  sigset_t all, previous;
  sigfillset(&all);
  for (int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  std::string failure;
  try {
    for (int worker = 1; worker < num_threads_; ++worker) {
      shared_->threads.emplace_back([shared = shared_, worker] { shared->worker_main(worker); });
    }
  } catch (const std::system_error& e) {
    failure = "cannot start thread " + std::to_string(shared_->threads.size() + 2) + " of " +
              std::to_string(num_threads_) + " (" + e.what() + "): ask for fewer threads";
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  if (!failure.empty()) {
    shared_->shut_down();
    delete shared_;
    throw OutOfMemory(failure);
  }
}

ThreadPool::~ThreadPool() {
  if (shared_->forks != fork_count.load(std::memory_order_relaxed)) {
    return;  // the threads live in the parent process only; joining them would wait for ever
  }
  shared_->shut_down();
  delete shared_;
}

void ThreadPool::run(int64_t n, void* fn, Task task) {
  Shared& s = *shared_;
  if (s.forks != fork_count.load(std::memory_order_relaxed)) {
    throw InternalError(
        "this process was forked after the threads of pyengine were started, and threads do not "
        "survive fork(): create the LLM in the child process (or start it with 'spawn')");
  }
  if (s.busy.exchange(true, std::memory_order_acquire)) {
    throw InternalError(
        "parallel_for is already running on this thread pool: one thread at a time, no nesting");
  }
  struct Release {
    std::atomic<bool>& busy;
    ~Release() { busy.store(false, std::memory_order_release); }
  } release{s.busy};

  if (n <= 1 || num_threads_ == 1) {
    for (int64_t i = 0; i < n; ++i) task(fn, i, 0);
    return;
  }
  s.task = task;
  s.fn = fn;
  s.n = n;
  s.next.store(0, std::memory_order_relaxed);
  s.open_loop();
  s.work_through(0);
  s.close_loop();
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace pyengine

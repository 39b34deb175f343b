// Worker threads of one ExecContext.
//
// The calling thread is worker 0. Between two loops the others spin for some tens of microseconds,
// the time between two ops of a step, and then sleep. A loop never waits for a worker that has not
// joined it, so a worker that wakes late, or finds no free processor, delays nobody.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyengine {

class ThreadPool {
 public:
  // 0 threads: usable_cpus(). Throws ConfigError below 0 or above kMaxThreads.
  explicit ThreadPool(int num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  static constexpr int kMaxThreads = 1024;

  int num_threads() const { return num_threads_; }

  // fn(index, worker) for every index in [0, n), each exactly once, in no promised order; worker is
  // in [0, num_threads()) and no two calls run on one worker at once. Returns when all are done.
  // The first exception stops handing out indices and is rethrown here. fn may not start another
  // loop, and one thread at a time may run one (InternalError otherwise).
  template <class F>
  void parallel_for(int64_t n, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run(n, const_cast<void*>(static_cast<const void*>(&fn)),
        [](void* f, int64_t index, int worker) { (*static_cast<Fn*>(f))(index, worker); });
  }

 private:
  using Task = void (*)(void* fn, int64_t index, int worker);
  struct Shared;

  void run(int64_t n, void* fn, Task task);

  int num_threads_;
  Shared* shared_;
};

}  // namespace pyengine

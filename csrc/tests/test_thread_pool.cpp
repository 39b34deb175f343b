#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <thread>
#include <vector>

#include "core/arena.h"
#include "core/cpu_count.h"
#include "core/errors.h"
#include "core/thread_pool.h"
#include "tests/check.h"

using pyengine::Arena;
using pyengine::ArenaScope;
using pyengine::ThreadPool;

namespace {

// Every index once, no worker twice at a time, results visible afterwards without atomics.
void run_loops(int threads, int loops) {
  ThreadPool pool(threads);
  std::vector<int64_t> count(257), per_worker(threads);
  std::vector<std::atomic<int>> inside(threads);
  for (int loop = 0; loop < loops; ++loop) {
    const int64_t n = loop % static_cast<int>(count.size());
    pool.parallel_for(n, [&](int64_t i, int worker) {
      if (inside[worker].fetch_add(1) != 0) throw std::runtime_error("a worker runs two at once");
      ++count[i];
      ++per_worker[worker];
      inside[worker].fetch_sub(1);
    });
  }
  int64_t total = 0;
  for (size_t i = 0; i < count.size(); ++i) {
    int64_t expected = 0;
    for (int loop = 0; loop < loops; ++loop) {
      expected += static_cast<int64_t>(i) < loop % static_cast<int>(count.size());
    }
    CHECK_EQ(count[i], expected);
    total += expected;
  }
  CHECK_EQ(std::accumulate(per_worker.begin(), per_worker.end(), int64_t{0}), total);
}

}  // namespace

TEST(every_index_runs_once) {
  for (int threads : {1, 2, 3, 8}) run_loops(threads, 2000);
}

TEST(sleeping_workers_wake_up) {
  ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // far longer than they spin
    // The caller alone cannot pass the first index: each index waits for the other to have started.
    std::atomic<int> started{0};
    pool.parallel_for(2, [&](int64_t, int) {
      ++started;
      while (started.load() < 2) std::this_thread::yield();
    });
    CHECK_EQ(started.load(), 2);
  }
}

TEST(exceptions_reach_the_caller) {
  for (int threads : {1, 4}) {
    ThreadPool pool(threads);
    for (int i = 0; i < 200; ++i) {
      std::atomic<int> ran{0};
      auto loop = [&] {
        pool.parallel_for(1000, [&](int64_t index, int) {
          ++ran;
          if (index == 3) throw pyengine::RequestError("index 3");
        });
      };
      CHECK_THROWS(loop(), pyengine::RequestError, "index 3");
      CHECK(ran.load() >= 4);
    }
    int64_t sum = 0;  // the pool still works
    pool.parallel_for(1, [&](int64_t, int) { ++sum; });
    CHECK_EQ(sum, 1);
  }
}

TEST(nested_loops_are_refused) {
  ThreadPool pool(2);
  auto nested = [&] {
    pool.parallel_for(4, [&](int64_t, int) { pool.parallel_for(1, [](int64_t, int) {}); });
  };
  CHECK_THROWS(nested(), pyengine::InternalError, "no nesting");
}

TEST(pools_start_and_stop_at_any_time) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(1 + i % 5);
    if (i % 2 == 0) pool.parallel_for(i, [](int64_t, int) {});
  }
}

TEST(thread_counts_are_checked) {
  CHECK_THROWS(ThreadPool(-1), pyengine::ConfigError, "-1");
  CHECK_THROWS(ThreadPool(ThreadPool::kMaxThreads + 1), pyengine::ConfigError, "num_threads");
  CHECK_EQ(ThreadPool(0).num_threads(), pyengine::usable_cpus());
}

#if !defined(__SANITIZE_THREAD__)  // TSan does not follow a fork of a process with threads
TEST(use_after_fork_is_an_error) {
  ThreadPool pool(2);
  pool.parallel_for(8, [](int64_t, int) {});
  pid_t child = fork();
  if (child == 0) {
    try {
      pool.parallel_for(8, [](int64_t, int) {});
    } catch (const pyengine::InternalError& e) {
      bool clear = std::string(e.what()).find("child process") != std::string::npos;
      {
        ThreadPool fresh(2);
        fresh.parallel_for(8, [](int64_t, int) {});
      }
      _exit(clear ? 0 : 2);
    }
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
  pool.parallel_for(8, [](int64_t, int) {});  // the parent goes on
}
#endif

namespace {

void write(const std::string& path, const std::string& text) {
  for (size_t slash = path.find('/', 1); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    mkdir(path.substr(0, slash).c_str(), 0755);
  }
  std::ofstream(path) << text;
}

std::string fresh_directory() {
  char name[] = "/tmp/pyengine-test-XXXXXX";
  CHECK(mkdtemp(name) != nullptr);
  return name;
}

}  // namespace

TEST(cgroup_quota_limits_the_threads) {
  const std::string v2 = fresh_directory();
  CHECK_EQ(pyengine::cgroup_cpu_limit(v2), 0);
  write(v2 + "/proc/self/cgroup", "0::/a/b\n");
  write(v2 + "/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  CHECK_EQ(pyengine::cgroup_cpu_limit(v2), 0);
  write(v2 + "/sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  CHECK_EQ(pyengine::cgroup_cpu_limit(v2), 2);  // 1.5, from above
  write(v2 + "/sys/fs/cgroup/a/b/cpu.max", "10000 100000\n");
  CHECK_EQ(pyengine::cgroup_cpu_limit(v2), 1);
  const std::string v1 = fresh_directory();
  write(v1 + "/proc/self/cgroup", "7:memory:/x\n4:cpu,cpuacct:/c\n");
  write(v1 + "/sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us", "-1\n");
  write(v1 + "/sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(pyengine::cgroup_cpu_limit(v1), 0);
  write(v1 + "/sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us", "300000\n");
  CHECK_EQ(pyengine::cgroup_cpu_limit(v1), 3);
  CHECK_EQ(std::system(("rm -r " + v1 + " " + v2).c_str()), 0);
}

TEST(arena_pointers_stay_valid_while_it_grows) {
  Arena arena;
  size_t settled = 0;
  for (int step = 0; step < 5; ++step) {
    ArenaScope outer(arena);
    auto* small = arena.take<float>(1000);
    small[999] = 7;
    CHECK_EQ(reinterpret_cast<uintptr_t>(small) % 64, size_t{0});
    {
      ArenaScope inner(arena);
      for (int i = 0; i < 4; ++i) {
        auto* large = arena.take<double>(3 << 20);
        large[0] = large[(3 << 20) - 1] = 1;
        CHECK_EQ(reinterpret_cast<uintptr_t>(large) % 64, size_t{0});
      }
    }
    CHECK_EQ(small[999], 7.0f);
    if (step == 1) settled = arena.capacity();
    if (step > 1) CHECK_EQ(arena.capacity(), settled);  // nothing is allocated any more
  }
}

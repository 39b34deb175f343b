// Compiled without ThreadSanitizer's instrumentation: what lanes exchange here is ordered by the
// switches, which ThreadSanitizer is told not to take for synchronisation.
#include "cuda_sim/sim.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <vector>

#include "cuda_sim/fiber.h"

#if defined(PYENGINE_SIM_TSAN)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_ignore_thread_begin() {}
static void __tsan_ignore_thread_end() {}
#endif

namespace pyengine::sim {

namespace {

// While it lives, what library functions do for the scheduler is no access of the kernel's.
struct Unwatched {
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
};

struct Copy {
  void* dst;
  const void* src;
  size_t bytes, valid;
};

enum class State { ready, at_barrier, in_collective, finished };

struct Thread {
  int index = 0;
  State state = State::ready;
  const char* file = nullptr;  // where it waits
  int line = 0;
  Place place;
  unsigned barriers = 0, warp_barriers = 0;  // passed in this block
  bool waited = false;                       // for the kernel before
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
  std::unique_ptr<Fiber> fiber;
};

struct Meeting {  // of lanes of a warp
  int warp;
  uint32_t mask, arrived;
  Combine combine;
  const char* file;
  int line;
  void* lanes[32];
};

struct SharedArray {
  void* data;
  size_t bytes;
};

class Device {
 public:
  Options options;

  void run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
           const std::function<void()>& body);
  Thread& current() {
    if (current_ == nullptr) throw std::logic_error("no kernel runs");
    return *current_;
  }
  void* shared(const void* key, size_t bytes);
  void* dynamic() const { return dynamic_; }
  void barrier(const char* file, int line);
  void meet(uint32_t mask, Combine combine, void* mine, const char* file, int line);
  void wait(State state, const char* file, int line);
  void sync_warp(uint32_t mask, const char* file, int line);

 private:
  void run_block(Dim3 index);
  void start_threads(int n);
  Thread& next_ready();
  [[noreturn]] void fail(const std::string& what);
  std::string waiting() const;
  void clear();

  const char* kernel_ = nullptr;
  Dim3 grid_, block_, index_;
  size_t shared_bytes_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  int live_ = 0, num_threads_ = 0, waiting_at_barrier_ = 0;
  Thread* current_ = nullptr;
  std::vector<Thread*> ready_;
  std::vector<Meeting> meetings_;
  std::map<const void*, SharedArray> arrays_;
  size_t static_bytes_ = 0;
  std::vector<char> arena_;  // under ThreadSanitizer
  void* dynamic_ = nullptr;
  std::string error_;
  std::mt19937_64 random_;
  // Addresses for __tsan_acquire and __tsan_release. Barriers take turns with two: who leaves one
  // late must not learn what others did before the next.
  char start_token_ = 0, end_token_ = 0, barrier_tokens_[2] = {}, warp_tokens_[32][2] = {};
};

Device& device() {
  static Device one;
  return one;
}

void Device::start_threads(int n) {
  while (static_cast<int>(threads_.size()) < n) {
    auto thread = std::make_unique<Thread>();
    Thread* t = thread.get();
    t->index = static_cast<int>(threads_.size());
    t->fiber = std::make_unique<Fiber>([this, t] {
      for (;;) {
        __tsan_acquire(&start_token_);
        try {
          (*body_)();
          if (!t->open_group.empty()) throw Fault("asynchronous copies were never committed");
          for (const auto& group : t->groups) {
            if (!group.empty()) throw Fault("asynchronous copies were never waited for");
          }
        } catch (const std::exception& e) {
          error_ = e.what();
        }
        __tsan_release(&end_token_);
        t->state = State::finished;
        t->fiber->suspend();
      }
    });
    threads_.push_back(std::move(thread));
  }
}

Thread& Device::next_ready() {
  size_t chosen = 0;
  if (options.seed == 0) {
    chosen = std::min_element(ready_.begin(), ready_.end(),
                              [](auto* a, auto* b) { return a->index < b->index; }) -
             ready_.begin();
  } else if (options.seed == 1) {
    chosen = std::max_element(ready_.begin(), ready_.end(),
                              [](auto* a, auto* b) { return a->index < b->index; }) -
             ready_.begin();
  } else {
    chosen = random_() % ready_.size();
  }
  Thread* t = ready_[chosen];
  ready_[chosen] = ready_.back();
  ready_.pop_back();
  return *t;
}

std::string Device::waiting() const {
  std::map<std::string, std::vector<int>> places;
  for (int i = 0; i < num_threads_; ++i) {
    const Thread& t = *threads_[i];
    std::ostringstream where;
    if (t.state == State::finished) {
      where << "has ended";
    } else {
      where << (t.state == State::at_barrier ? "__syncthreads at " : "a warp operation at ")
            << t.file << ":" << t.line;
    }
    places[where.str()].push_back(i);
  }
  std::ostringstream text;
  for (const auto& [where, which] : places) {
    text << "; " << where << ": " << which.size() << " threads, " << which.front() << " first";
  }
  return text.str();
}

void Device::clear() {
#if !defined(PYENGINE_SIM_TSAN)
  for (auto& [key, array] : arrays_) std::free(array.data);
#endif
  arrays_.clear();
  std::free(dynamic_);
  dynamic_ = nullptr;
  static_bytes_ = 0;
}

void Device::fail(const std::string& what) {
  std::ostringstream text;
  text << kernel_ << ", block (" << index_.x << ", " << index_.y << ", " << index_.z
       << "): " << what;
  __tsan_acquire(&end_token_);
  // Fibers that stand in the middle of a kernel cannot be used again.
  current_ = nullptr;
  ready_.clear();
  meetings_.clear();
  threads_.clear();
  clear();
  throw Fault(text.str());
}

void Device::run_block(Dim3 index) {
  index_ = index;
  num_threads_ = static_cast<int>(block_.x * block_.y * block_.z);
  start_threads(num_threads_);
  live_ = num_threads_;
  waiting_at_barrier_ = 0;
  error_.clear();
  dynamic_ = std::malloc(shared_bytes_ > 0 ? shared_bytes_ : 1);
  poison(dynamic_, shared_bytes_);
#if defined(PYENGINE_SIM_TSAN)
  arena_.resize(64 * 1024);
  poison(arena_.data(), arena_.size());
#endif
  for (int i = 0; i < num_threads_; ++i) {
    Thread& t = *threads_[i];
    const auto n = static_cast<unsigned>(i);
    t.place = {
        {n % block_.x, n / block_.x % block_.y, n / block_.x / block_.y}, index, block_, grid_};
    t.state = State::ready;
    t.barriers = t.warp_barriers = 0;
    t.waited = false;
    t.groups.clear();
    t.open_group.clear();
    ready_.push_back(&t);
  }
  __tsan_release(&start_token_);
  while (live_ > 0) {
    if (ready_.empty()) fail("threads wait for others that never come" + waiting());
    Thread& t = next_ready();
    current_ = &t;
    t.fiber->resume();
    current_ = nullptr;
    if (!error_.empty()) __tsan_acquire(&end_token_);
    if (!error_.empty()) fail(error_ + " (thread " + std::to_string(t.index) + ")");
    if (t.state == State::finished) --live_;
  }
  __tsan_acquire(&end_token_);
  clear();
}

void Device::run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
                 const std::function<void()>& body) {
  kernel_ = kernel;
  grid_ = grid;
  block_ = block;
  index_ = {0, 0, 0};
  shared_bytes_ = shared_bytes;
  body_ = &body;
  random_.seed(options.seed);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024) fail("blocks of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
         std::to_string(grid.z) + ") blocks");
  }
  if (shared_bytes > options.shared_limit) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory");
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (options.seed == 1) std::reverse(order.begin(), order.end());
  if (options.seed > 1) std::shuffle(order.begin(), order.end(), random_);
  for (uint64_t i : order) {
    run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / grid.x / grid.y)});
  }
}

void* Device::shared(const void* key, size_t bytes) {
  const Unwatched unwatched;
  auto found = arrays_.find(key);
  if (found == arrays_.end()) {
    static_bytes_ = (static_bytes_ + 15) / 16 * 16 + bytes;
    if (static_bytes_ > 48 * 1024 || static_bytes_ + shared_bytes_ > options.shared_limit) {
      throw Fault("too much shared memory: " + std::to_string(static_bytes_) + " bytes static");
    }
#if defined(PYENGINE_SIM_TSAN)
    // An allocation by one thread of the block would not be ordered before the others' use of it.
    void* data = arena_.data() + (static_bytes_ - bytes);
#else
    void* data = nullptr;
    if (posix_memalign(&data, 16, bytes) != 0) throw std::bad_alloc();
    poison(data, bytes);
#endif
    found = arrays_.emplace(key, SharedArray{data, bytes}).first;
  }
  return found->second.data;
}

// Within an Unwatched, which ends meanwhile: should the block fail, the fiber never comes back.
void Device::wait(State state, const char* file, int line) {
  Thread& t = current();
  t.state = state;
  t.file = file;
  t.line = line;
  __tsan_release(&end_token_);  // should the block fail, what threads did so far lies behind it
  __tsan_ignore_thread_end();
  t.fiber->suspend();
  __tsan_ignore_thread_begin();
}

void Device::barrier(const char* file, int line) {
  char* const token = &barrier_tokens_[current().barriers++ % 2];
  __tsan_release(token);
  const Unwatched unwatched;
  if (++waiting_at_barrier_ < num_threads_) {
    wait(State::at_barrier, file, line);
  } else {
    for (int i = 0; i < num_threads_; ++i) {
      Thread& t = *threads_[i];
      if (t.state != State::at_barrier) continue;
      if (t.line != line || std::strcmp(t.file, file) != 0) {
        std::ostringstream text;
        text << "__syncthreads in divergent code: " << t.file << ":" << t.line << " and " << file
             << ":" << line;
        throw Fault(text.str());
      }
      t.state = State::ready;
      ready_.push_back(&t);
    }
    waiting_at_barrier_ = 0;
    // The last to come waits its turn like the others.
    ready_.push_back(&current());
    wait(State::ready, file, line);
  }
  __tsan_acquire(token);
}

void Device::meet(uint32_t mask, Combine combine, void* mine, const char* file, int line) {
  const Unwatched unwatched;
  Thread& t = current();
  const int warp = t.index / 32, lane = t.index % 32;
  const int last = std::min(num_threads_ - warp * 32, 32);
  if ((mask >> lane & 1) == 0) throw Fault("a lane is not in the mask of its warp operation");
  if (last < 32 && (mask >> last) != 0) throw Fault("a mask names lanes that the block lacks");
  auto same = [&](const Meeting& m) {
    return m.warp == warp && m.mask == mask && m.combine == combine && m.line == line &&
           std::strcmp(m.file, file) == 0;
  };
  auto meeting = std::find_if(meetings_.begin(), meetings_.end(), same);
  if (meeting == meetings_.end()) {
    meetings_.push_back({warp, mask, 0, combine, file, line, {}});
    meeting = meetings_.end() - 1;
  }
  meeting->arrived |= uint32_t{1} << lane;
  meeting->lanes[lane] = mine;
  if (meeting->arrived != mask) {
    wait(State::in_collective, file, line);
    return;
  }
  const Meeting done = *meeting;
  meetings_.erase(meeting);
  combine(mask, done.lanes);
  for (int i = 0; i < 32; ++i) {
    if (i == lane || (mask >> i & 1) == 0) continue;
    Thread& other = *threads_[warp * 32 + i];
    other.state = State::ready;
    ready_.push_back(&other);
  }
  ready_.push_back(&t);
  wait(State::ready, file, line);
}

void write(const Copy& copy) {
  std::memcpy(copy.dst, copy.src, copy.valid);
  std::memset(static_cast<char*>(copy.dst) + copy.valid, 0, copy.bytes - copy.valid);
}

struct Exchange {
  uint64_t bits, result;
  int operand, width;
  Shuffle how;
};

void exchange(uint32_t mask, void* const lanes[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto* e = static_cast<Exchange*>(lanes[lane]);
    const int base = lane / e->width * e->width, inside = lane % e->width;
    int source = inside;
    switch (e->how) {
      case Shuffle::index:
        source = e->operand & (e->width - 1);
        break;
      case Shuffle::exclusive_or:
        source = inside ^ e->operand;
        break;
      case Shuffle::down:
        source = inside + e->operand;
        break;
      case Shuffle::up:
        source = inside - e->operand;
        break;
    }
    if (source < 0 || source >= e->width) source = inside;  // such lanes keep what they have
    source += base;
    // What a lane outside the mask would give is undefined: poison.
    e->result = (mask >> source & 1) != 0
                    ? static_cast<Exchange*>(lanes[source])->bits
                    : uint64_t{device().options.poison} << 32 | device().options.poison;
  }
}

struct Vote {
  bool vote;
  uint32_t result;
};

void count_votes(uint32_t mask, void* const lanes[32]) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && static_cast<Vote*>(lanes[lane])->vote) {
      votes |= uint32_t{1} << lane;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<Vote*>(lanes[lane])->result = votes;
  }
}

void nothing(uint32_t, void* const[32]) {}

void Device::sync_warp(uint32_t mask, const char* file, int line) {
  Thread& t = current();
  char* const token = &warp_tokens_[t.index / 32][t.warp_barriers++ % 2];
  __tsan_release(token);
  meet(mask, nothing, nullptr, file, line);
  __tsan_acquire(token);
}

}  // namespace

Options& options() { return device().options; }

void run_grid(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
              const std::function<void()>& body) {
  device().run(kernel, grid, block, shared_bytes, body);
}

const Place& place() { return device().current().place; }
void* shared_array(const void* key, size_t bytes) { return device().shared(key, bytes); }
void* dynamic_shared() { return device().dynamic(); }
void sync_threads(const char* file, int line) { device().barrier(file, line); }

void sync_warp(uint32_t mask, const char* file, int line) { device().sync_warp(mask, file, line); }

void collective(uint32_t mask, Combine combine, void* mine, const char* file, int line) {
  device().meet(mask, combine, mine, file, line);
}

uint64_t shuffle(uint32_t mask, Shuffle how, uint64_t bits, int operand, int width,
                 const char* file, int line) {
  Exchange e{bits, 0, operand, width, how};
  device().meet(mask, exchange, &e, file, line);
  return e.result;
}

uint32_t ballot(uint32_t mask, bool vote, const char* file, int line) {
  Vote v{vote, 0};
  device().meet(mask, count_votes, &v, file, line);
  return v.result;
}

void copy_async(void* dst, const void* src, size_t bytes, size_t valid_bytes) {
  if (reinterpret_cast<uintptr_t>(dst) % bytes != 0 ||
      (valid_bytes > 0 && reinterpret_cast<uintptr_t>(src) % bytes != 0)) {
    throw Fault("an asynchronous copy of " + std::to_string(bytes) + " bytes is misaligned");
  }
  const Copy copy{dst, src, bytes, valid_bytes};
  if ((options().seed & 1) != 0) return write(copy);
  const Unwatched unwatched;
  device().current().open_group.push_back(copy);
}

void copy_async_commit() {
  const Unwatched unwatched;
  Thread& t = device().current();
  t.groups.push_back(std::move(t.open_group));
  t.open_group.clear();
}

void copy_async_wait(int groups_left) {
  auto& groups = device().current().groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) write(copy);
    const Unwatched unwatched;
    groups.erase(groups.begin());
  }
}

void wait_for_previous() { device().current().waited = true; }

void require_waited() {
  if (!device().current().waited) throw Fault("a thread never called start_after_previous()");
}

void poison(void* data, size_t bytes) {
  const uint32_t pattern = options().poison;
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<unsigned char*>(data)[i] = static_cast<unsigned char>(pattern >> (i % 4 * 8));
  }
}

}  // namespace pyengine::sim

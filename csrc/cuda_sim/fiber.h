// Fibers: stacks that one operating system thread switches between, known to the sanitizers.
#pragma once

#include <cstddef>
#include <functional>

namespace pyengine::sim {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  // Runs `loop`, which must not return, when first resumed.
  explicit Fiber(std::function<void()> loop);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();   // called by the scheduler, on its own stack
  void suspend();  // called by the fiber: back to the scheduler

 private:
  static void start();

  std::function<void()> loop_;
  void* mapping_ = nullptr;
  void* stack_ = nullptr;    // lowest address
  void* context_ = nullptr;  // stack pointer, or a ucontext_t
  void* scheduler_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's, of the fiber while it is suspended
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void* tsan_ = nullptr;
  void* tsan_scheduler_ = nullptr;
};

}  // namespace pyengine::sim

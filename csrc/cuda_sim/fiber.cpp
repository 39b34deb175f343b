#include "cuda_sim/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PYENGINE_SIM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
extern "C" void pyengine_sim_switch(void** save, void* load);
// Saves what the System V ABI calls callee-saved, changes stacks, and restores it.
asm(R"(
.text
.globl pyengine_sim_switch
.hidden pyengine_sim_switch
.type pyengine_sim_switch, @function
pyengine_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyengine_sim_switch, .-pyengine_sim_switch
)");
#else
#include <ucontext.h>
#endif

namespace pyengine::sim {

namespace {
Fiber* starting = nullptr;
}

Fiber::Fiber(std::function<void()> loop) : loop_(std::move(loop)) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapping_ = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping_, page, PROT_NONE);  // a stack that overflows ends here
  stack_ = static_cast<char*>(mapping_) + page;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack_) + kStackBytes);
  *--top = 0;  // where start() would return to; keeps its frame aligned
  *--top = reinterpret_cast<uint64_t>(&Fiber::start);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context_ = top;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::start, 0);
  context_ = context;
  scheduler_ = new ucontext_t;
#endif
#if defined(PYENGINE_SIM_TSAN)
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  // What the frames that were given up have marked would hold for who gets these addresses next.
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
#if defined(PYENGINE_SIM_TSAN)
  __tsan_destroy_fiber(tsan_);
#endif
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(context_);
  delete static_cast<ucontext_t*>(scheduler_);
#endif
  munmap(mapping_, kStackBytes + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

void Fiber::start() {
  Fiber* self = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_stack_, &self->scheduler_stack_bytes_);
#endif
  self->loop_();
  std::abort();
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, kStackBytes);
#endif
#if defined(PYENGINE_SIM_TSAN)
  tsan_scheduler_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  pyengine_sim_switch(&scheduler_, context_);
#else
  swapcontext(static_cast<ucontext_t*>(scheduler_), static_cast<ucontext_t*>(context_));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(PYENGINE_SIM_TSAN)
  __tsan_switch_to_fiber(tsan_scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  pyengine_sim_switch(&context_, scheduler_);
#else
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(scheduler_));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

}  // namespace pyengine::sim

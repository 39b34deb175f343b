// What an operation runs on: worker threads, an instruction set, and scratch memory.
#pragma once

#include <cstddef>

#include "core/arena.h"
#include "core/profile.h"
#include "core/thread_pool.h"

namespace pyengine {

namespace cpu {
struct Kernels;  // csrc/cpu/kernels.h: one table of functions per instruction set
}

struct ExecContext {
  ThreadPool& pool;
  Arena& arena;                 // scratch of the running op; the op resets what it took
  const cpu::Kernels& kernels;  // chosen once, at run time (csrc/cpu/dispatch.h)
  Profile* profile = nullptr;   // where the model notes the time of its parts, if anywhere
};

}  // namespace pyengine

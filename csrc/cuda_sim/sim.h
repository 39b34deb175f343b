// A simulator of one CUDA device, for tests: the kernels of csrc/cuda, compiled by the host's
// compiler, run block by block, each thread of a block as a fiber of one operating system thread.
//
// What it finds: threads that wait for others that never come (barriers and warp operations in
// divergent code), reads of memory that nobody wrote (run twice, with two poison patterns, and
// compare), dependence on the order in which threads and blocks run (run with several seeds and
// compare), reads and writes out of bounds (under AddressSanitizer: shared arrays and device
// buffers are allocations of their own), races between two barriers (under ThreadSanitizer).
// What it does not: docs/cuda.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace pyengine::sim {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel did that no device would forgive: kernel, block, threads and where they stand.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  // Order of threads and blocks: 0 rising, 1 falling, others random. Bit 0 also decides when
  // asynchronous copies write: 0 as late as their wait allows, 1 at once.
  uint64_t seed = 0;
  uint32_t poison = 0xffffffffu;    // what memory holds before it is written: NaN
  size_t shared_limit = 99 * 1024;  // bytes of a block, as on sm_86 and sm_89
  size_t device_memory = size_t{1} << 33;
  int capability = 80, driver = 13000;  // 0: no driver
  bool cublaslt = true;                 // is installed
};
Options& options();

// Runs `body` once for each thread of the grid. Throws Fault.
void run_grid(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
              const std::function<void()>& body);

// What the running thread sees.
struct Place {
  Dim3 thread, block, block_dim, grid_dim;
};
const Place& place();

// The array of the running block that belongs to `key`; poisoned when the block's first thread
// asks.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

void sync_threads(const char* file, int line);
void sync_warp(uint32_t mask, const char* file, int line);

// All lanes of `mask` meet; then `combine` sees what each has brought, by lane, and may change it.
using Combine = void (*)(uint32_t mask, void* const lanes[32]);
void collective(uint32_t mask, Combine combine, void* mine, const char* file, int line);

enum class Shuffle { index, exclusive_or, down, up };
uint64_t shuffle(uint32_t mask, Shuffle how, uint64_t bits, int operand, int width,
                 const char* file, int line);
uint32_t ballot(uint32_t mask, bool vote, const char* file, int line);

// Asynchronous copies of the running thread: they write at the wait that covers them, or before.
void copy_async(void* dst, const void* src, size_t bytes, size_t valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// The running thread has waited for the kernel before it (start_after_previous of csrc/cuda), and
// is asked at its end whether it has. Kernels run one after the other here all the same: what one
// reads too early is not found.
void wait_for_previous();
void require_waited();

// Fills memory with the poison pattern.
void poison(void* data, size_t bytes);

}  // namespace pyengine::sim

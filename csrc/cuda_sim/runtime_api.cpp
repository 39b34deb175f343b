#include "cuda_sim/runtime_api.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace pyengine::sim {

struct Graph {
  std::vector<std::function<void()>> work;
};

struct Event {
  std::chrono::steady_clock::time_point reached;
};

struct Stream {
  std::deque<std::function<void()>> queue;
  std::unique_ptr<Graph> capture;
};

namespace {
std::mutex memory_mutex;  // of the two below
std::map<void*, size_t> allocations;
size_t total_allocated = 0;

// There is one device, on which the streams of several host threads take turns.
void run(Stream& stream) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  while (!stream.queue.empty()) {
    const std::function<void()> work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
  }
}
}  // namespace

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream->capture) {
    stream->capture->work.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
  }
}

size_t allocated_bytes() { return total_allocated; }

}  // namespace pyengine::sim

namespace sim = pyengine::sim;

namespace {
constexpr int kRuntimeVersion = 13000;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "error on the simulator";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (sim::options().driver < kRuntimeVersion) return cudaErrorInsufficientDriver;
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "simulator");
  p->major = sim::options().capability / 10;
  p->minor = sim::options().capability % 10;
  p->totalGlobalMem = sim::options().device_memory;
  p->sharedMemPerBlockOptin = sim::options().shared_limit;
  p->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = sim::options().capability / 10;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = sim::options().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = sim::options().device_memory;
  *free = *total - sim::total_allocated;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
  const std::lock_guard<std::mutex> lock(sim::memory_mutex);
  if (sim::total_allocated + bytes > sim::options().device_memory) return cudaErrorMemoryAllocation;
  // Not a byte more than was asked for: AddressSanitizer's red zone begins where the buffer ends.
  if (posix_memalign(p, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  sim::poison(*p, bytes);
  sim::allocations[*p] = bytes;
  sim::total_allocated += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(sim::memory_mutex);
  const auto found = sim::allocations.find(p);
  if (found == sim::allocations.end()) return cudaErrorInvalidValue;
  sim::total_allocated -= found->second;
  sim::allocations.erase(found);
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  // Not a byte more than was asked for: AddressSanitizer's red zone begins where the buffer ends.
  if (posix_memalign(p, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  sim::poison(*p, bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new sim::Stream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream->capture) return cudaErrorInvalidValue;
  sim::run(*stream);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  sim::enqueue(stream, [=] { std::memcpy(dst, src, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* dst, int value, size_t bytes, cudaStream_t stream) {
  sim::enqueue(stream, [=] { std::memset(dst, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new sim::Event;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  sim::enqueue(stream, [event] { event->reached = std::chrono::steady_clock::now(); });
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(end->reached - start->reached).count();
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream->capture) return cudaErrorInvalidValue;
  stream->capture = std::make_unique<sim::Graph>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!stream->capture) return cudaErrorInvalidValue;
  *graph = stream->capture.release();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new sim::Graph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const auto& work : exec->work) sim::enqueue(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

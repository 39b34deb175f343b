// A CUDA device as the back end uses it: one stream, device memory, pinned host memory, graphs.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#if defined(PYENGINE_CUDA_SIM)
#include "cuda_sim/runtime_api.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace pyengine::cuda {

// The compute capabilities that this library has code for; it runs on the lowest and all above it.
#if defined(PYENGINE_CUDA_ARCHITECTURES)
constexpr const char* kArchitectures = PYENGINE_CUDA_ARCHITECTURES;
constexpr int kLowestArchitecture = PYENGINE_CUDA_LOWEST_ARCHITECTURE;
#else
constexpr const char* kArchitectures = "75";
constexpr int kLowestArchitecture = 75;
#endif

// Throws OutOfMemory or InternalError, with CUDA's name for it and what was being done.
void require_success(cudaError_t error, const char* doing);

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  size_t total_memory = 0, free_memory = 0;
  int multiprocessors = 0;
  size_t shared_limit = 0;  // bytes a block may have
};

// Chooses device 0. Throws ConfigError where there is none, the driver is too old for this build,
// or the capability is below 7.5 or what this build has code for.
DeviceInfo open_device();

class Stream {
 public:
  Stream();
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  bool overlaps() const { return overlaps_; }  // may a kernel start before the one before has ended
  void wait() { require_success(cudaStreamSynchronize(stream_), "running a step"); }
  // Both return at once; host memory must stay as it is until wait().
  void upload(void* device, const void* host, size_t bytes);
  void download(void* host, const void* device, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);  // both on the device

 private:
  cudaStream_t stream_ = nullptr;
  bool overlaps_ = false;
};

// Memory of the device. `what` is for the error: "the KV cache", "weights", ...
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(size_t bytes, const char* what);  // throws OutOfMemory, with the sizes
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  std::byte* bytes() const { return static_cast<std::byte*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Page-locked memory of the host, which copies need to run beside the host's work.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t bytes);
  ~PinnedBuffer() { cudaFreeHost(data_); }
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  void* data() const { return data_; }
  std::byte* bytes() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return size_; }

 private:
  void swap(PinnedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Work that was queued once and is queued again by one call.
class Graph {
 public:
  // Queues nothing: what `work` queues on the stream becomes the graph.
  Graph(Stream& stream, const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void run(Stream& stream);

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace pyengine::cuda

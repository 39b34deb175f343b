#include "core/errors.h"
#include "cuda/runtime.h"

namespace pyengine::cuda {

namespace {

std::string megabytes(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

std::string version(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

}  // namespace

void require_success(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  const std::string text = std::string("CUDA: ") + doing + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw InternalError(text);
}

DeviceInfo open_device() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (driver == 0) {
    throw ConfigError("device=\"cuda\": no NVIDIA driver is installed on this machine");
  }
  if (error == cudaErrorInsufficientDriver) {
    throw ConfigError("device=\"cuda\": the driver supports CUDA " + version(driver) +
                      ", but this build needs " + version(runtime) +
                      "; install a newer driver, or build with an older toolkit");
  }
  if (error != cudaSuccess || count == 0) {
    throw ConfigError(std::string("device=\"cuda\": the driver finds no GPU") +
                      (error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error)));
  }
  require_success(cudaSetDevice(0), "choosing device 0");
  cudaDeviceProp properties;
  require_success(cudaGetDeviceProperties(&properties, 0), "reading the properties of device 0");
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.shared_limit = properties.sharedMemPerBlockOptin;
  const int capability = info.major * 10 + info.minor;
  const std::string has = "device=\"cuda\": " + info.name + " has compute capability " +
                          std::to_string(info.major) + "." + std::to_string(info.minor);
  if (capability < 75) throw ConfigError(has + ", but 7.5 or higher is needed");
  if (capability < kLowestArchitecture) {
    throw ConfigError(has + ", but this build has code for " + kArchitectures +
                      " and later; install pyengine again with PYENGINE_CUDA_ARCHITECTURES=" +
                      std::to_string(capability));
  }
  require_success(cudaMemGetInfo(&info.free_memory, &info.total_memory), "asking for free memory");
  return info;
}

Stream::Stream() {
  require_success(cudaStreamCreate(&stream_), "creating a stream");
  int major = 0;
  require_success(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0),
                  "reading the properties of device 0");
  overlaps_ = major >= 9;
}

void Stream::upload(void* device, const void* host, size_t bytes) {
  require_success(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_),
                  "copying to the device");
}

void Stream::download(void* host, const void* device, size_t bytes) {
  require_success(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_),
                  "copying from the device");
}

void Stream::copy(void* to, const void* from, size_t bytes) {
  require_success(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_),
                  "copying on the device");
}

DeviceBuffer::DeviceBuffer(size_t bytes, const char* what) : size_(bytes) {
  const cudaError_t error = cudaMalloc(&data_, bytes > 0 ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // otherwise the next launch would report it
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw OutOfMemory(std::string(what) + " takes " + megabytes(bytes) +
                      " of the GPU's memory, but " + megabytes(free) + " of " + megabytes(total) +
                      " are free; lower kv_cache_memory, max_num_seqs or max_num_batched_tokens");
  }
  require_success(error, what);
}

PinnedBuffer::PinnedBuffer(size_t bytes) : size_(bytes) {
  require_success(cudaMallocHost(&data_, bytes > 0 ? bytes : 1), "allocating pinned memory");
}

Graph::Graph(Stream& stream, const std::function<void()>& work) {
  require_success(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
                  "capturing a graph");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream.get(), &graph);
    cudaGraphDestroy(graph);
    throw;
  }
  require_success(cudaStreamEndCapture(stream.get(), &graph), "capturing a graph");
  const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
  cudaGraphDestroy(graph);
  require_success(error, "instantiating a graph");
}

Graph::~Graph() { cudaGraphExecDestroy(exec_); }

void Graph::run(Stream& stream) {
  require_success(cudaGraphLaunch(exec_, stream.get()), "running a graph");
}

}  // namespace pyengine::cuda

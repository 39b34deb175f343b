// How kernels_bench times a case: operands, captured launches, a JSON line.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/blas.h"
#include "cuda/kernels.h"

namespace pyengine::cuda::bench {

struct ModelShape {
  const char* name;
  int channels, n_head, vocab, positions;
  int head_dim() const { return channels / n_head; }
};

// "tiny" is for the simulator.
constexpr ModelShape kModels[] = {
    {"124M", 768, 12, 50257, 1024}, {"1.5B", 1600, 25, 50257, 1024}, {"tiny", 32, 2, 61, 64}};

struct Options {
  std::vector<std::string> models, dtypes, kernels;
  bool tiny() const { return models == std::vector<std::string>{"tiny"}; }
  bool wants(const char* kernel) const {
    return kernels.empty() || std::find(kernels.begin(), kernels.end(), kernel) != kernels.end();
  }
};

// Device memory that is given out piece by piece, full of random numbers of one dtype.
class Memory {
 public:
  // `period` numbers, a multiple of 1024, that come again and again.
  Memory(Stream& stream, size_t bytes, size_t period)
      : stream_(&stream),
        period_(period),
        pool_(bytes, "the benchmark's operands"),
        random_(period * sizeof(float), "random numbers"),
        pattern_(period * sizeof(float), "random numbers") {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal(0, 0.05f);
    std::vector<float> numbers(period);
    for (float& x : numbers) x = normal(engine);
    stream.upload(random_.data(), numbers.data(), random_.size());
    stream.wait();
  }

  // Everything given out comes back, and holds random numbers again.
  void reset(DType dtype) {
    const size_t bytes = period_ * size_of(dtype);
    if (dtype != filled_) {
      convert_weight(*stream_, random_.data(), DType::f32, false, period_ / 1024, 1024,
                     pattern_.data(), dtype);
      used_ = pool_.size();
    }
    for (size_t at = 0; at < used_; at += bytes) {
      stream_->copy(pool_.bytes() + at, pattern_.data(), std::min(bytes, pool_.size() - at));
    }
    filled_ = dtype;
    used_ = 0;
  }
  template <class T = void>
  T* take(size_t bytes) {
    const size_t begin = used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > pool_.size()) throw std::runtime_error("the benchmark's memory is too small");
    return reinterpret_cast<T*>(pool_.bytes() + begin);
  }
  const int32_t* integers(const std::vector<int32_t>& values) {
    auto* device = take<int32_t>(values.size() * 4);
    stream_->upload(device, values.data(), values.size() * 4);
    stream_->wait();
    return device;
  }
  size_t used() const { return used_; }
  size_t left() const { return pool_.size() - used_; }

 private:
  Stream* stream_;
  size_t period_;
  DeviceBuffer pool_, random_, pattern_;
  DType filled_ = DType::i8;  // as nothing yet
  size_t used_ = 0;
};

using Launch = std::function<void()>;

struct Case {
  const char* kernel;
  std::string shape;  // members of a JSON object, each with a comma behind it
  DType dtype;
  double bytes, flops;
  std::function<Launch(Memory&)> prepare;  // takes one set of operands
};

class Event {
 public:
  Event() { require_success(cudaEventCreate(&event_), "creating an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream& stream) {
    require_success(cudaEventRecord(event_, stream.get()), "recording an event");
  }
  double us_since(const Event& start) const {
    float ms = 0;
    require_success(cudaEventElapsedTime(&ms, start.event_, event_), "reading a time");
    return ms * 1e3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class Bench {
 public:
  explicit Bench(Options options)
      : options_(std::move(options)),
        memory_(stream_, options_.tiny() ? 2 << 20 : size_t{2} << 30,
                options_.tiny() ? 1 << 11 : 1 << 22) {}

  const Options& options() const { return options_; }
  Stream& stream() { return stream_; }
  Blas* blas() { return blas_.get(); }
  void run(const Case& c);
  void copy_bandwidth();

 private:
  double microseconds(const std::function<void()>& work);
  // Microseconds of a replay of `count` launches: median and least.
  std::pair<double, double> time(const std::vector<Launch>& launches, size_t count);

  Options options_;
  Stream stream_;
  Event start_, stop_;
  std::unique_ptr<Blas> blas_ = Blas::open();
  Memory memory_;
};

inline double Bench::microseconds(const std::function<void()>& work) {
  start_.record(stream_);
  work();
  stop_.record(stream_);
  stream_.wait();
  return stop_.us_since(start_);
}

inline std::pair<double, double> Bench::time(const std::vector<Launch>& launches, size_t count) {
  Graph graph(stream_, [&] {
    for (size_t i = 0; i < count; ++i) launches[i % launches.size()]();
  });
  auto replay = [&] { return microseconds([&] { graph.run(stream_); }); };
  if (options_.tiny()) return {replay(), 0};
  replay();
  constexpr double kWanted = 20e3;  // microseconds of all replays
  const double first = replay();
  const auto repeats = static_cast<size_t>(std::clamp(kWanted / std::max(first, 1.0), 5.0, 30.0));
  std::vector<double> times(repeats);
  for (double& t : times) t = replay();
  std::sort(times.begin(), times.end());
  return {times[repeats / 2], times[0]};
}

inline void Bench::run(const Case& c) {
  constexpr size_t kBeyondCaches = size_t{512} << 20, kMostSets = 128;
  memory_.reset(c.dtype);
  std::vector<Launch> launches;
  do {
    launches.push_back(c.prepare(memory_));
  } while (memory_.used() < kBeyondCaches && launches.size() < kMostSets &&
           memory_.left() > memory_.used() / launches.size() && !options_.tiny());
  stream_.wait();
  // Short kernels many times, so that the replay's beginning does not count; long ones less often
  // than there are sets. The first launch loads the kernel.
  constexpr double kReplay = 10e3;  // microseconds
  launches[0]();
  const double once = microseconds(launches.back());
  size_t count = 1;
  if (!options_.tiny()) {
    count = static_cast<size_t>(std::clamp(kReplay / std::max(once, 1.0), 1.0, 128.0));
    count = std::min(count, std::max<size_t>(launches.size(), 64));
  }
  const auto [median, least] = time(launches, count);
  const auto n = static_cast<double>(count);
  std::printf(
      "{\"kernel\": \"%s\", %s\"dtype\": \"%s\", \"us\": %.3f, \"us_min\": %.3f, \"sets\": %zu, "
      "\"bytes\": %.0f, \"flops\": %.0f}\n",
      c.kernel, c.shape.c_str(), name_of(c.dtype), median / n, least / n, launches.size(), c.bytes,
      c.flops);
  std::fflush(stdout);
}

// Read and write of a copy that no cache holds.
inline void Bench::copy_bandwidth() {
  memory_.reset(DType::f32);
  const size_t bytes = memory_.left() / 2 / 256 * 256;
  auto* from = memory_.take(bytes);
  auto* to = memory_.take(bytes);
  const std::vector<Launch> launches = {[&] { stream_.copy(to, from, bytes); }};
  for (int i = 0; i < 3; ++i) time(launches, 4);  // while clocks rise
  const auto [median, least] = time(launches, 4);
  std::printf("{\"kernel\": \"copy\", \"us\": %.3f, \"us_min\": %.3f, \"bytes\": %zu}\n",
              median / 4, least / 4, 2 * bytes);
}

inline std::string member(const char* name, int64_t value) {
  return "\"" + std::string(name) + "\": " + std::to_string(value) + ", ";
}
inline std::string member(const char* name, const char* value) {
  return "\"" + std::string(name) + "\": \"" + value + "\", ";
}

}  // namespace pyengine::cuda::bench

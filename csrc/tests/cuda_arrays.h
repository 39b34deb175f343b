// Arrays on a CUDA device (or the simulator) for tests, and rounding to its dtypes, written
// independently of the kernels'.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "cuda/runtime.h"

namespace pyengine::test {

// The nearest value of `dtype`, ties to even, as float32; far from overflow.
inline float rounded(float x, DType dtype) {
  if (dtype == DType::f32 || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int bits = dtype == DType::f16 ? 11 : 8;
  if (dtype == DType::f16 && exponent < -13) exponent = -13;  // subnormal
  const float unit = std::ldexp(1.0f, exponent - bits);
  return std::nearbyint(x / unit) * unit;
}

inline double epsilon(DType dtype) {  // largest relative error of one rounding
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

inline uint16_t half_bits(float x, DType dtype) {  // x is a value of dtype
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (dtype == DType::bf16) return static_cast<uint16_t>(word >> 16);
  const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(size * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(size, &exponent);
  return static_cast<uint16_t>(
      sign | (((exponent + 14) << 10) + static_cast<int>(fraction * 2048) - 1024));
}

inline float half_value(uint16_t bits, DType dtype) {
  if (dtype == DType::bf16) {
    const uint32_t word = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31;
  const float size = exponent == 0
                         ? std::ldexp(static_cast<float>(bits & 1023), -24)
                         : std::ldexp(static_cast<float>((bits & 1023) + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

#if !defined(PYENGINE_CUDA_SIM)
// What memory of a GPU that nobody wrote consists of; the simulator has patterns of its own. 0xff
// makes NaNs of every dtype.
inline int& unwritten_byte() {
  static int byte = 0xff;
  return byte;
}
#endif

// Numbers on the device.
class Array {
 public:
  Array(cuda::Stream& stream, DType dtype, size_t n)
      : stream_(&stream), dtype_(dtype), n_(n), buffer_(n * size_of(dtype), "a test") {
#if !defined(PYENGINE_CUDA_SIM)
    cuda::require_success(
        cudaMemsetAsync(buffer_.data(), unwritten_byte(), buffer_.size(), stream.get()), "a test");
#endif
  }
  Array(cuda::Stream& stream, DType dtype, const std::vector<float>& values)
      : Array(stream, dtype, values.size()) {
    set(values);
  }

  void set(const std::vector<float>& values) {
    if (dtype_ == DType::f32) {
      stream_->upload(buffer_.data(), values.data(), n_ * 4);
      stream_->wait();
      return;
    }
    std::vector<uint16_t> halves(n_);
    for (size_t i = 0; i < n_; ++i) halves[i] = half_bits(rounded(values[i], dtype_), dtype_);
    stream_->upload(buffer_.data(), halves.data(), n_ * 2);
    stream_->wait();
  }

  std::vector<float> get() {
    std::vector<float> values(n_);
    if (dtype_ == DType::f32) {
      stream_->download(values.data(), buffer_.data(), n_ * 4);
      stream_->wait();
      return values;
    }
    std::vector<uint16_t> halves(n_);
    stream_->download(halves.data(), buffer_.data(), n_ * 2);
    stream_->wait();
    for (size_t i = 0; i < n_; ++i) values[i] = half_value(halves[i], dtype_);
    return values;
  }

  void* data() const { return buffer_.data(); }
  float* f32() const { return buffer_.as<float>(); }

 private:
  cuda::Stream* stream_;
  DType dtype_;
  size_t n_;
  cuda::DeviceBuffer buffer_;
};

class Integers {
 public:
  Integers(cuda::Stream& stream, const std::vector<int32_t>& values)
      : buffer_(values.size() * 4, "a test") {
    stream.upload(buffer_.data(), values.data(), values.size() * 4);
    stream.wait();
  }
  const int32_t* data() const { return buffer_.as<int32_t>(); }

 private:
  cuda::DeviceBuffer buffer_;
};

inline std::mt19937& random_engine() {
  static std::mt19937 engine(17);
  return engine;
}
// N(0, scale), rounded to dtype.
inline std::vector<float> normals(size_t n, float scale, DType dtype = DType::f32) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = rounded(normal(random_engine()), dtype);
  return x;
}

}  // namespace pyengine::test

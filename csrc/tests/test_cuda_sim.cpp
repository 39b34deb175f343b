// The simulator of csrc/cuda_sim itself: what it computes, and that it finds what it says it finds.
#include <array>
#include <random>
#include <vector>

#include "core/errors.h"
#include "cuda/tensor_core.h"
#include "tests/check.h"

namespace {

using namespace pyengine;
using namespace pyengine::cuda;

// Options for one test; the defaults come back at its end.
struct With {
  explicit With(uint64_t seed, uint32_t poison = 0xffffffffu) {
    sim::options().seed = seed;
    sim::options().poison = poison;
  }
  ~With() { sim::options() = sim::Options(); }
};

// These kernels run alone, and need not wait for others.
template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
  sim::run_grid("kernel", grid, block, shared, [&] { kernel(static_cast<P>(arguments)...); });
}

// Reverses blocks of values through shared memory.
__global__ void reverse(const int* in, int* out) {
  start_after_previous();
  PYENGINE_SHARED(values, int[64]);
  const unsigned n = blockDim.x, i = blockIdx.x * n + threadIdx.x;
  values[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = values[n - 1 - threadIdx.x];
}

__global__ void reverse_without_barrier(const int* in, int* out) {
  PYENGINE_SHARED(values, int[64]);
  const unsigned n = blockDim.x, i = blockIdx.x * n + threadIdx.x;
  values[threadIdx.x] = in[i];
  out[i] = values[n - 1 - threadIdx.x];
}

TEST(blocks_threads_and_shared_memory) {
  for (uint64_t seed : {0, 1, 2, 3}) {
    With with(seed);
    std::vector<int> in(192), out(192, -1);
    for (int i = 0; i < 192; ++i) in[i] = i * i;
    run(reverse, 3, 64, 0, in.data(), out.data());
    for (int i = 0; i < 192; ++i) CHECK_EQ(out[i], in[i / 64 * 64 + 63 - i % 64]);
  }
}

#if !defined(__SANITIZE_THREAD__)  // which ends the process at the race
TEST(a_missing_barrier_shows_as_a_difference) {
  std::vector<int> in(64, 1), rising(64), falling(64);
  {
    With with(0, 0);
    run(reverse_without_barrier, 1, 64, 0, in.data(), rising.data());
  }
  {
    With with(1, 0);
    run(reverse_without_barrier, 1, 64, 0, in.data(), falling.data());
  }
  CHECK(rising != falling);
}
#endif

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void lane_outside_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 1);
}

TEST(divergence_is_found) {
  std::vector<int> out(32);
  CHECK_THROWS(run(half_a_barrier, 1, 64, 0), sim::Fault, "never come");
  CHECK_THROWS(run(two_barriers, 1, 64, 0), sim::Fault, "divergent");
  CHECK_THROWS(run(divergent_shuffle, 1, 32, 0, out.data()), sim::Fault, "never come");
  CHECK_THROWS(run(lane_outside_mask, 1, 32, 0, out.data()), sim::Fault, "mask");
  CHECK_THROWS(run(reverse, 1, 2048, 0, nullptr, nullptr), sim::Fault, "2048 threads");
  CHECK_THROWS(run(reverse, 1, 64, 200 << 10, nullptr, nullptr), sim::Fault, "shared memory");
  std::vector<int> in(64, 3);  // and after a fault everything works
  out.resize(64);
  run(reverse, 1, 64, 0, in.data(), out.data());
  CHECK(in == out);
}

__global__ void unwritten_shared(uint32_t* out) {
  PYENGINE_SHARED(values, uint32_t[8]);
  if (threadIdx.x == 0) out[0] = values[3];
}

TEST(unwritten_memory_is_poison) {
  uint32_t a = 0, b = 0;
  {
    With with(0, 0xffffffffu);
    run(unwritten_shared, 1, 32, 0, &a);
  }
  {
    With with(0, 0x12345678u);
    run(unwritten_shared, 1, 32, 0, &b);
  }
  CHECK_EQ(a, 0xffffffffu);
  CHECK_EQ(b, 0x12345678u);
}

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(kAllLanes, lane * 3, lane + 1, 8);
  out[32 + lane] = __shfl_xor_sync(kAllLanes, lane * 3, 5);
  out[64 + lane] = __shfl_down_sync(kAllLanes, lane * 3, 4, 16);
  out[96 + lane] = __shfl_up_sync(kAllLanes, lane * 3, 4);
  out[128 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  double sum = warp_sum(1.5 * lane);
  out[160 + lane] = static_cast<int>(sum);
}

TEST(warp_operations) {
  for (uint64_t seed : {0, 1, 7}) {
    With with(seed);
    std::vector<int> out(192);
    run(shuffles, 1, 32, 0, out.data());
    int votes = 0;
    for (int i = 0; i < 32; i += 3) votes |= static_cast<int>(1u << i);
    for (int i = 0; i < 32; ++i) {
      CHECK_EQ(out[i], 3 * (i / 8 * 8 + (i + 1) % 8));
      CHECK_EQ(out[32 + i], 3 * (i ^ 5));
      CHECK_EQ(out[64 + i], 3 * (i % 16 + 4 < 16 ? i + 4 : i));
      CHECK_EQ(out[96 + i], 3 * (i >= 4 ? i - 4 : i));
      CHECK_EQ(out[128 + i], votes);
      CHECK_EQ(out[160 + i], 744);
    }
  }
}

__global__ void count(unsigned long long* total) {
  atomicAdd(total, static_cast<unsigned long long>(threadIdx.x));
}

TEST(atomics) {
  unsigned long long total = 0;
  run(count, 4, 100, 0, &total);
  CHECK_EQ(total, 4u * 4950u);
}

// Sixteen bytes of each thread through shared memory, with or without the wait.
template <bool waits>
__global__ void staged(const uint32_t* in, uint32_t* out) {
  PYENGINE_SHARED(values, uint32_t[32][4]);
  copy_async(values[threadIdx.x], in + 4 * threadIdx.x, threadIdx.x != 7);
  copy_async_commit();
  if (waits) copy_async_wait<0>();
  __syncthreads();
  const unsigned other = (threadIdx.x + 5) % 32;
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = values[other][i];
  if (!waits) copy_async_wait<0>();
}

TEST(asynchronous_copies_arrive_at_the_wait) {
  alignas(16) uint32_t in[128], out[128];
  for (uint32_t i = 0; i < 128; ++i) in[i] = i + 1;
  for (uint64_t seed : {0, 1, 2, 3}) {
    With with(seed);
    run(staged<true>, 1, 32, 0, in, out);
    for (uint32_t i = 0; i < 128; ++i) {
      const uint32_t from = (i / 4 + 5) % 32 * 4 + i % 4;
      CHECK_EQ(out[i], from / 4 == 7 ? 0 : from + 1);
    }
  }
#if !defined(__SANITIZE_THREAD__)
  With with(0);
  run(staged<false>, 1, 32, 0, in, out);
  CHECK_EQ(out[0], 0xffffffffu);
#endif
}

template <class T>
__global__ void one_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  const uint32_t my_a[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  const uint32_t my_b[2] = {b[2 * lane], b[2 * lane + 1]};
  float my_d[4] = {d[4 * lane], d[4 * lane + 1], d[4 * lane + 2], d[4 * lane + 3]};
  mma<T>(my_d, my_a, my_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = my_d[i];
}

// The PTX manual's formulas, element by element: a0..a7, b0..b3, c0..c3 of a lane.
struct Element {
  int row, column;
};
Element a_element(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
  const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
  return {row, column};
}
Element b_element(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, group};
}
Element c_element(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

template <class T>
void check_mma() {
  std::mt19937 rng(3);
  std::uniform_int_distribution<int> small(-8, 8);
  float a[16][16], b[16][8], c[16][8];
  for (auto& row : a)
    for (float& x : row) x = static_cast<float>(small(rng)) / 4;
  for (auto& row : b)
    for (float& x : row) x = static_cast<float>(small(rng)) / 8;
  for (auto& row : c)
    for (float& x : row) x = static_cast<float>(small(rng));
  uint32_t a_words[128], b_words[64];
  float d[128];
  for (int lane = 0; lane < 32; ++lane) {
    auto from_a = [&](int i) { return a[a_element(lane, i).row][a_element(lane, i).column]; };
    auto from_b = [&](int i) { return b[b_element(lane, i).row][b_element(lane, i).column]; };
    for (int i = 0; i < 4; ++i) {
      a_words[4 * lane + i] = pair_of<T>(from_a(2 * i), from_a(2 * i + 1));
      d[4 * lane + i] = c[c_element(lane, i).row][c_element(lane, i).column];
    }
    for (int i = 0; i < 2; ++i)
      b_words[2 * lane + i] = pair_of<T>(from_b(2 * i), from_b(2 * i + 1));
  }
  run(one_mma<T>, 1, 32, 0, a_words, b_words, d);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = c_element(lane, i);
      float expected = c[row][column];  // exact in float32: small multiples of 1/32
      for (int k = 0; k < 16; ++k) expected += a[row][k] * b[k][column];
      CHECK_EQ(d[4 * lane + i], expected);
    }
  }
}

TEST(mma_has_the_lane_layout_of_the_manual) {
  check_mma<f16>();
  check_mma<bf16>();
}

template <bool transposed>
__global__ void load_matrices(const uint16_t* in, uint32_t* out) {
  PYENGINE_SHARED(m, uint16_t[32][8]);
  for (int i = 0; i < 8; ++i) m[threadIdx.x][i] = in[8 * threadIdx.x + i];
  __syncthreads();
  uint32_t words[4];
  if (transposed) {
    ldmatrix4_transposed(words, m[threadIdx.x]);
  } else {
    ldmatrix4(words, m[threadIdx.x]);
  }
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = words[i];
}

TEST(ldmatrix_has_the_lane_layout_of_the_manual) {
  std::vector<uint16_t> in(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i * 7 + 1);
  std::vector<uint32_t> plain(128), transposed(128);
  run(load_matrices<false>, 1, 32, 0, in.data(), plain.data());
  run(load_matrices<true>, 1, 32, 0, in.data(), transposed.data());
  // Thread 0 holds elements 0 and 1 of row 0, thread 1 elements 2 and 3, thread 4 begins row 1.
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int element = 2 * lane + half;  // of the 64 of a matrix, row by row
        const auto value = [half](uint32_t word) { return word >> (16 * half) & 0xffffu; };
        CHECK_EQ(value(plain[4 * lane + i]), in[64 * i + element]);
        CHECK_EQ(value(transposed[4 * lane + i]), in[64 * i + element % 8 * 8 + element / 8]);
      }
    }
  }
}

TEST(streams_run_when_waited_for_and_graphs_again) {
  Stream stream;
  DeviceBuffer buffer(64 * 4, "a test");
  std::vector<int> in(64), out(64, 0);
  for (int i = 0; i < 64; ++i) in[i] = i;
  stream.upload(buffer.data(), in.data(), 256);
  Graph graph(stream, [&] {
    launch("reverse", stream, reverse, 1, 64, 0, buffer.as<int>(), buffer.as<int>());
  });
  graph.run(stream);
  graph.run(stream);
  graph.run(stream);
  stream.download(out.data(), buffer.data(), 256);
  CHECK_EQ(out[0], 0);  // nobody has waited yet
  CHECK_EQ(out[63], 0);
  stream.wait();
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[i], 63 - i);
}

TEST(a_kernel_that_does_not_wait_for_the_one_before_is_found) {
  Stream stream;
  DeviceBuffer buffer(64 * 4, "a test");
  launch("reverse", stream, reverse_without_barrier, 1, 64, 0, buffer.as<int>(), buffer.as<int>());
  CHECK_THROWS(stream.wait(), sim::Fault, "never called start_after_previous");
}

TEST(memory_runs_out_with_the_sizes) {
  CHECK_THROWS(DeviceBuffer(size_t{1} << 40, "the KV cache"), OutOfMemory, "8192 MiB");
  CHECK_EQ(sim::allocated_bytes(), 0u);
}

TEST(half_precision_conversions) {
  // Every float16 and bfloat16 comes back as it was, and rounding is to nearest even.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 h{static_cast<uint16_t>(bits)};
    const bf16 b{static_cast<uint16_t>(bits)};
    if (widen(h) == widen(h)) CHECK_EQ(narrowed<f16>(widen(h)).bits, h.bits);
    if (widen(b) == widen(b)) CHECK_EQ(narrowed<bf16>(widen(b)).bits, b.bits);
  }
  CHECK_EQ(narrowed<f16>(1 + 0x1p-11f).bits, 0x3c00);
  CHECK_EQ(narrowed<f16>(1 + 3 * 0x1p-11f).bits, 0x3c02);
  CHECK_EQ(narrowed<f16>(65519.0f).bits, 0x7bff);
  CHECK_EQ(narrowed<f16>(65520.0f).bits, 0x7c00);
  CHECK_EQ(narrowed<f16>(0x1p-25f).bits, 0);
  CHECK_EQ(narrowed<f16>(-0x1.8p-24f).bits, 0x8002);
  CHECK_EQ(narrowed<bf16>(1 + 0x1p-8f).bits, 0x3f80);
  CHECK_EQ(narrowed<bf16>(1 + 3 * 0x1p-8f).bits, 0x3f82);
}

}  // namespace

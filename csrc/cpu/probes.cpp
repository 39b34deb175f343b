// Probes of the limits: a loop that only reads, and loops of independent multiply-adds on
// registers. The loops are inline assembly, so that one file compiled for the baseline holds them
// all.
#include "cpu/probes.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "core/memory.h"
#include "cpu/amx_permission.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyengine::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The sum keeps the loop alive; eight of them are enough for 16-byte vectors at any memory's speed.
uint64_t sum_of(const uint64_t* data, int64_t words) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= words; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += data[i + j];
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total;
}

struct Probe {
  const char* name;
  bool supported;
  double ops_per_round;
  void (*run)(int64_t rounds);
};

// Twelve registers of sums hide the latency of any multiply-add: at most 5 cycles, two per cycle.
#define PYENGINE_TWELVE(step)                                                               \
  step("0") step("1") step("2") step("3") step("4") step("5") step("6") step("7") step("8") \
      step("9") step("10") step("11")
#define PYENGINE_LOOP(begin, body, end) \
  asm volatile(begin "1:\n" body end : "+r"(rounds) : : PYENGINE_CLOBBERS)

#if defined(__x86_64__)

#define PYENGINE_CLOBBERS                                                                        \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define PYENGINE_AGAIN "dec %0\njnz 1b\n"

// Zeros everywhere: denormal numbers would take a detour through microcode.
void sse(int64_t rounds) {
#define PYENGINE_STEP(i) "mulps %%xmm12, %%xmm" i "\n"
#define PYENGINE_ZERO(i) "xorps %%xmm" i ", %%xmm" i "\n"
  PYENGINE_LOOP(PYENGINE_TWELVE(PYENGINE_ZERO) PYENGINE_ZERO("12"), PYENGINE_TWELVE(PYENGINE_STEP),
                PYENGINE_AGAIN);
#undef PYENGINE_STEP
#undef PYENGINE_ZERO
}

#define PYENGINE_AVX_PROBE(name, step)                                                 \
  void name(int64_t rounds) {                                                          \
    PYENGINE_LOOP("vzeroall\n", PYENGINE_TWELVE(step), PYENGINE_AGAIN "vzeroupper\n"); \
  }
#define PYENGINE_STEP(i) "vfmadd231ps %%ymm12, %%ymm12, %%ymm" i "\n"
PYENGINE_AVX_PROBE(fma_avx2, PYENGINE_STEP)
#undef PYENGINE_STEP
#define PYENGINE_STEP(i) "vfmadd231ps %%zmm12, %%zmm12, %%zmm" i "\n"
PYENGINE_AVX_PROBE(fma_avx512, PYENGINE_STEP)
#undef PYENGINE_STEP
#define PYENGINE_STEP(i) "vdpbf16ps %%zmm12, %%zmm12, %%zmm" i "\n"
PYENGINE_AVX_PROBE(dot_bf16, PYENGINE_STEP)
#undef PYENGINE_STEP
// Bytes to 16-bit pairs, those to 32-bit sums: three instructions.
#define PYENGINE_STEP(i)                   \
  "vpmaddubsw %%ymm12, %%ymm12, %%ymm14\n" \
  "vpmaddwd %%ymm14, %%ymm13, %%ymm15\n"   \
  "vpaddd %%ymm15, %%ymm" i ", %%ymm" i "\n"
PYENGINE_AVX_PROBE(madd_avx2, PYENGINE_STEP)
#undef PYENGINE_STEP
#define PYENGINE_STEP(i) "%{vex%} vpdpbusd %%ymm12, %%ymm12, %%ymm" i "\n"
PYENGINE_AVX_PROBE(avx_vnni, PYENGINE_STEP)
#undef PYENGINE_STEP
#define PYENGINE_STEP(i) "vpdpbusd %%zmm12, %%zmm12, %%zmm" i "\n"
PYENGINE_AVX_PROBE(avx512_vnni, PYENGINE_STEP)
#undef PYENGINE_STEP

// Tiles 0 to 3 are sums, 4 to 7 factors, each 16 rows of 64 bytes; without factors loaded from
// memory they are what ldtilecfg leaves: zeros.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define PYENGINE_AMX_PROBE(name, instruction)                                                    \
  void name(int64_t rounds) {                                                                    \
    const TileConfig config;                                                                     \
    asm volatile("ldtilecfg %1\n1:\n" instruction " %%tmm6, %%tmm4, %%tmm0\n" instruction        \
                 " %%tmm7, %%tmm4, %%tmm1\n" instruction " %%tmm6, %%tmm5, %%tmm2\n" instruction \
                 " %%tmm7, %%tmm5, %%tmm3\n" PYENGINE_AGAIN "tilerelease\n"                      \
                 : "+r"(rounds)                                                                  \
                 : "m"(config)                                                                   \
                 : "cc");                                                                        \
  }
PYENGINE_AMX_PROBE(amx_bf16, "tdpbf16ps")
PYENGINE_AMX_PROBE(amx_int8, "tdpbusd")

bool cpuid_bit(unsigned subleaf, int reg, int bit) {  // leaf 7; reg: 0 eax, 3 edx
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) != 0 && ((r[reg] >> bit) & 1);
}

std::vector<Probe> probes() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  const bool tiles = amx_permitted();
  return {
      {"float32 baseline", true, 12 * 4, sse},
      {"float32 avx2", avx2, 12 * 8 * 2, fma_avx2},
      {"float32 avx512", avx512, 12 * 16 * 2, fma_avx512},
      {"bfloat16 avx512_bf16", avx512 && cpuid_bit(1, 0, 5), 12 * 32 * 2, dot_bf16},
      {"bfloat16 amx", tiles, 4 * 16 * 16 * 32 * 2, amx_bf16},
      {"int8 avx2", avx2, 12 * 32 * 2, madd_avx2},
      {"int8 avx_vnni", avx2 && cpuid_bit(1, 0, 4), 12 * 32 * 2, avx_vnni},
      {"int8 avx512_vnni", avx512 && __builtin_cpu_supports("avx512vnni"), 12 * 64 * 2,
       avx512_vnni},
      {"int8 amx", tiles, 4 * 16 * 16 * 64 * 2, amx_int8},
  };
}

#elif defined(__aarch64__)

#define PYENGINE_CLOBBERS \
  "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12"

void neon(int64_t rounds) {
#define PYENGINE_STEP(i) "fmla v" i ".4s, v12.4s, v12.4s\n"
#define PYENGINE_ZERO(i) "movi v" i ".4s, #0\n"
  PYENGINE_LOOP(PYENGINE_TWELVE(PYENGINE_ZERO) PYENGINE_ZERO("12"), PYENGINE_TWELVE(PYENGINE_STEP),
                "subs %0, %0, #1\nb.ne 1b\n");
}

std::vector<Probe> probes() { return {{"float32 baseline", true, 12 * 4 * 2, neon}}; }

#else

std::vector<Probe> probes() { return {}; }

#endif

constexpr int kTries = 4;

double ops_per_second(ThreadPool& pool, const Probe& probe) {
  // Items of some tens of microseconds, and milliseconds in all: a worker may wake late.
  constexpr int64_t kRounds = 8192;
  const int64_t items = 256 * pool.num_threads();
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const auto start = Clock::now();
    pool.parallel_for(items, [&](int64_t, int) { probe.run(kRounds); });
    best = std::max(best, items * kRounds * probe.ops_per_round / seconds_since(start));
  }
  return best;
}

}  // namespace

double read_bandwidth(ThreadPool& pool, size_t bytes) {
  constexpr int64_t kItemWords = 1 << 17;  // 1 MiB
  const int64_t items =
      std::max<int64_t>(1, static_cast<int64_t>(bytes / sizeof(uint64_t)) / kItemWords);
  AlignedBuffer buffer(items * kItemWords * sizeof(uint64_t));
  auto* data = reinterpret_cast<uint64_t*>(buffer.data());
  std::vector<uint64_t> sums(pool.num_threads() * 8);  // a cache line for each thread
  // Memory that was never written is one page of zeros, read from the cache.
  pool.parallel_for(items, [&](int64_t i, int) {
    std::fill_n(data + i * kItemWords, kItemWords, static_cast<uint64_t>(i));
  });
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const auto start = Clock::now();
    pool.parallel_for(items, [&](int64_t i, int worker) {
      sums[worker * 8] += sum_of(data + i * kItemWords, kItemWords);
    });
    best = std::max(best, items * kItemWords * sizeof(uint64_t) / seconds_since(start));
  }
  volatile uint64_t keep = sums[0];
  (void)keep;
  return best;
}

std::vector<std::pair<const char*, double>> arithmetic_peaks(ThreadPool& pool) {
  std::vector<std::pair<const char*, double>> peaks;
  for (const Probe& probe : probes()) {
    if (probe.supported) peaks.emplace_back(probe.name, ops_per_second(pool, probe));
  }
  return peaks;
}

}  // namespace pyengine::cpu

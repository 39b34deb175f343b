// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). A number depends on (seed, position, sample) alone: not on batch, order,
// threads or device.
#pragma once

#include <cstdint>

#include "core/both.h"

namespace pyengine {

struct PhiloxCounter {
  uint32_t word[4];
};
struct PhiloxKey {
  uint32_t word[2];
};

PYENGINE_BOTH inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter.word[0] = static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key.word[0];
    counter.word[1] = static_cast<uint32_t>(p1);
    counter.word[2] = static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key.word[1];
    counter.word[3] = static_cast<uint32_t>(p0);
    key.word[0] += 0x9E3779B9u;  // golden ratio
    key.word[1] += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return counter;
}

// Uniform in [0, 1), 53 bits, for one token of one sample of a request.
PYENGINE_BOTH inline double uniform(uint64_t seed, uint64_t position, uint64_t sample_index) {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  const PhiloxCounter r =
      philox4x32({{low(position), high(position), low(sample_index), high(sample_index)}},
                 {{low(seed), high(seed)}});
  const uint64_t bits = (uint64_t{r.word[1]} << 32 | r.word[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace pyengine

// Passes over one row of logits or weights. Unlike other kernels they give the same bits on every
// instruction set, so that a seed draws the same token from the same logits everywhere: products
// are not fused with sums, and sums run over 16 lanes, whatever the width of a vector, which are
// then added by halves.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int kSumLanes = 16;
constexpr int kSumVectors = kSumLanes / kLanes;

struct Lanes16 {
  Vf v[kSumVectors];
};

PYENGINE_INLINE Lanes16 lanes16(float a) {
  Lanes16 all;
  for (int j = 0; j < kSumVectors; ++j) all.v[j] = set1(a);
  return all;
}

PYENGINE_INLINE float sum16(const Lanes16& a) {
  if constexpr (kSumVectors == 4) {
    return sum(add(add(a.v[0], a.v[2]), add(a.v[1], a.v[3])));
  } else if constexpr (kSumVectors == 2) {
    return sum(add(a.v[0], a.v[1]));
  } else {
    return sum(a.v[0]);
  }
}

// exp(x) for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its series to r^7 / 7!; 0 below
// -87.25. Relative error below 2e-7.
PYENGINE_INLINE Vf exp_unfused(Vf x) {
  const Vf bounded = max(x, set1(-87.5f));
  const Vf shifted = add(mul(bounded, set1(1.44269504f)), set1(12582912.0f));  // 1.5 * 2^23
  const Vf n = sub(shifted, set1(12582912.0f));
  Vf r = sub(bounded, mul(n, set1(0.693359375f)));  // Cephes' split of ln 2
  r = sub(r, mul(n, set1(-2.12194440e-4f)));
  Vf p = set1(1.9841270e-4f);
  p = add(mul(p, r), set1(1.3888889e-3f));
  p = add(mul(p, r), set1(8.3333333e-3f));
  p = add(mul(p, r), set1(4.1666667e-2f));
  p = add(mul(p, r), set1(1.6666667e-1f));
  p = add(mul(p, r), set1(0.5f));
  p = add(mul(p, r), set1(1.0f));
  p = add(mul(p, r), set1(1.0f));
  const Vf power = as_float(shift_left<23>(add(as_int(shifted), set1(127))));
  return select_greater(bounded, set1(-87.25f), mul(p, power), zero());
}

// The largest of each kLogitBlock values; false if one is NaN.
static bool block_maxima(const float* x, int64_t n, float* maxima) {
  const Vf lowest = set1(-__builtin_inff());
  unsigned missing = 0;  // lanes that do not equal themselves
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t end = n - begin < kLogitBlock ? n : begin + kLogitBlock;
    Vf best = lowest;
    unsigned numbers = ~0u;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vf v = end - i >= kLanes ? load(x + i)
                                     : keep_first(load(x + i, static_cast<int>(end - i)),
                                                  static_cast<int>(end - i), lowest);
      best = max(v, best);
      numbers &= at_least_bits(v, lowest);
    }
    missing |= ~numbers;
    maxima[begin / kLogitBlock] = max_of(best);
  }
  return (missing & ((1u << kLanes) - 1)) == 0;
}

// out[i] = map(x[i]), i < n; returns the sum.
template <class Map>
PYENGINE_INLINE float map_block(const float* x, int64_t n, float* out, Map map) {
  Lanes16 total = lanes16(0.0f);
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumVectors; ++j) {
      const Vf v = map(load(x + i + j * kLanes));
      store(out + i + j * kLanes, v);
      total.v[j] = add(total.v[j], v);
    }
  }
  for (int j = 0; i < n; i += kLanes, ++j) {
    const int some = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const Vf v = keep_first(map(load(x + i, some)), some, zero());
    store(out + i, v, some);
    total.v[j] = add(total.v[j], v);
  }
  return sum16(total);
}

// weights = exp((x - max) * scale) where that is above `limit`, else 0, and the sum of each
// kLogitBlock of them; blocks whose maximum is below `skipped` are not looked at.
static void exp_weights(const float* x, const float* maxima, int64_t n, float highest, float scale,
                        float skipped, float limit, float* weights, float* block_sums) {
  const Vf shift = set1(highest), factor = set1(scale), above = set1(limit);
  auto weight = [&](Vf v) { return exp_unfused(mul(sub(v, shift), factor)); };
  auto heavy = [&](Vf v) {
    const Vf w = weight(v);
    return select_greater(w, above, w, zero());
  };
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t some = n - begin < kLogitBlock ? n - begin : kLogitBlock;
    float* out = weights + begin;
    float& sum = block_sums[begin / kLogitBlock];
    if (maxima[begin / kLogitBlock] < skipped) {
      __builtin_memset(out, 0, sizeof(float) * static_cast<size_t>(some));
      sum = 0.0f;
    } else {
      sum = limit < 0 ? map_block(x + begin, some, out, weight)
                      : map_block(x + begin, some, out, heavy);
    }
  }
}

constexpr int64_t kSumChunk = 2048;  // float sums of so many weights are added in double

// sums[k] = the weights above thresholds[k], k < kSumThresholds.
static void sums_above(const float* w, int64_t n, const float* thresholds, double* sums) {
  Vf limits[kSumThresholds];
  for (int k = 0; k < kSumThresholds; ++k) {
    limits[k] = set1(thresholds[k]);
    sums[k] = 0.0;
  }
  for (int64_t begin = 0; begin < n; begin += kSumChunk) {
    const int64_t end = n - begin < kSumChunk ? n : begin + kSumChunk;
    Lanes16 total[kSumThresholds];
    for (Lanes16& each : total) each = lanes16(0.0f);
    auto add_to = [&](int j, Vf v) {
      for (int k = 0; k < kSumThresholds; ++k) {
        total[k].v[j] = add(total[k].v[j], select_greater(v, limits[k], v, zero()));
      }
    };
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes) {
      for (int j = 0; j < kSumVectors; ++j) add_to(j, load(w + i + j * kLanes));
    }
    for (int j = 0; i < end; i += kLanes, ++j) {
      add_to(j, end - i < kLanes ? load(w + i, static_cast<int>(end - i)) : load(w + i));
    }
    for (int k = 0; k < kSumThresholds; ++k) sums[k] += sum16(total[k]);
  }
}

// Weights that are not above the threshold become 0; the sum of each kLogitBlock of them.
static void keep_above(float* w, int64_t n, float threshold, float* block_sums) {
  const Vf limit = set1(threshold);
  auto keep = [&](Vf v) { return select_greater(v, limit, v, zero()); };
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t some = n - begin < kLogitBlock ? n - begin : kLogitBlock;
    block_sums[begin / kLogitBlock] = map_block(w + begin, some, w + begin, keep);
  }
}

// Indices i with low <= x[i] < high, rising; returns how many. `indices` holds n.
static int64_t select_between(const float* x, int64_t n, float low, float high, int32_t* indices) {
  const Vf from = set1(low), to = set1(high);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf v = n - i >= kLanes ? load(x + i) : load(x + i, static_cast<int>(n - i));
    unsigned bits = at_least_bits(v, from) & ~at_least_bits(v, to);
    if (n - i < kLanes) bits &= (1u << (n - i)) - 1;
    for (; bits != 0; bits &= bits - 1) {
      indices[count++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
    }
  }
  return count;
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

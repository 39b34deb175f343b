// Row-wise operations: layer norm, embedding sum, conversions, and the reductions of scoring.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

// Sum of f(x[i]) in four chains of vectors, combined in one order.
template <class F>
PYENGINE_INLINE float sum_over(const float* x, int64_t n, F f) {
  Vf acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[v] = add(acc[v], f(load(x + i + v * kLanes)));
  }
  for (; i < n; i += kLanes) {
    const Vf y = f(load_upto(x + i, n - i));
    acc[0] = add(acc[0], n - i >= kLanes ? y : keep_first(y, static_cast<int>(n - i), zero()));
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

static void layer_norm_row(const float* x, int64_t n, const float* gain, const float* bias,
                           float eps, void* out, bool out_bf16) {
  const float count = static_cast<float>(n);
  const Vf mean =
      set1(sum_over(x, n, [](Vf v) __attribute__((always_inline)) { return v; }) / count);
  const float variance = sum_over(x, n,
                                  [mean](Vf v) __attribute__((always_inline)) {
                                    const Vf d = sub(v, mean);
                                    return mul(d, d);
                                  }) /
                         count;
  const Vf inverse = set1(1.0f / __builtin_sqrtf(variance + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i;
    const Vf normal = mul(sub(load_upto(x + i, m), mean), inverse);
    const Vf y = fma(normal, load_upto(gain + i, m), load_upto(bias + i, m));
    if (out_bf16) {
      store_bf16_upto(static_cast<uint16_t*>(out) + i, y, m);
    } else {
      store_upto(static_cast<float*>(out) + i, y, m);
    }
  }
}

// Elements [i, i + kLanes) as float32, of which n remain.
PYENGINE_INLINE Vf load_as_f32(const void* p, DType dtype, int64_t i, int64_t n) {
  if (dtype == DType::f32) return load_upto(static_cast<const float*>(p) + i, n);
  const uint16_t* halves = static_cast<const uint16_t*>(p) + i;
  uint16_t copy[kLanes] = {};
  if (n < kLanes) {
    __builtin_memcpy(copy, halves, static_cast<size_t>(n) * 2);
    halves = copy;
  }
  return dtype == DType::bf16 ? load_bf16(halves) : load_f16(halves);
}

PYENGINE_INLINE void store_from_f32(void* p, DType dtype, int64_t i, Vf a, int64_t n) {
  if (dtype == DType::f32) return store_upto(static_cast<float*>(p) + i, a, n);
  uint16_t* halves = static_cast<uint16_t*>(p) + i;
  if (dtype == DType::bf16) return store_bf16_upto(halves, a, n);
  if (n >= kLanes) return store_f16(halves, a);
  uint16_t copy[kLanes];
  store_f16(copy, a);
  __builtin_memcpy(halves, copy, static_cast<size_t>(n) * 2);
}

static void add_rows(const void* a, const void* b, DType dtype, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_upto(out + i, add(load_as_f32(a, dtype, i, n - i), load_as_f32(b, dtype, i, n - i)),
               n - i);
  }
}

static void convert(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_from_f32(dst, dst_dtype, i, load_as_f32(src, src_dtype, i, n - i), n - i);
  }
}

static void max_sum_exp(const float* x, int64_t n, float* max_out, float* sum_out) {
  Vf best = set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf v = load_upto(x + i, n - i);
    best = max(best, n - i >= kLanes ? v : keep_first(v, static_cast<int>(n - i), best));
  }
  const float highest = max_of(best);
  const Vf shift = set1(highest == -__builtin_inff() ? 0.0f : highest);
  *max_out = highest;
  *sum_out =
      sum_over(x, n, [shift](Vf v) __attribute__((always_inline)) { return exp(sub(v, shift)); });
}

static int64_t select_at_least(const float* x, int64_t n, float threshold, int32_t* indices) {
  const Vf limit = set1(threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    unsigned bits = at_least_bits(load_upto(x + i, n - i), limit);
    if (n - i < kLanes) bits &= (1u << (n - i)) - 1;
    for (; bits != 0; bits &= bits - 1) {
      indices[count++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
    }
  }
  return count;
}

}  // namespace

}  // namespace pyengine::cpu::PYENGINE_ISA

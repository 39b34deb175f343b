// Writing an i8 cache (kv/layout.h): the scale of a token's head, and its integers.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kScaleBytes = 64;  // 16 f32 before the integers of a head

// 128 + integer of n channels to `put`, kLanes at a time; their scale to *scale: max |x| / 127, NaN
// if one is not a number or infinite.
template <class Put>
PYENGINE_INLINE void quantize_head(const float* x, int64_t n, float* scale, Put put) {
  Vf largest = zero(), nan = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf v = load_upto(x + i, n - i);
    largest = max(largest, abs(v));
    nan = fma(v, zero(), nan);  // infinity times zero is NaN too
  }
  const float peak = max_of(largest);
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  *scale = peak * (1.0f / 127.0f) + cpu::PYENGINE_ISA::sum(nan);
  const Vf shift = set1(12582912.0f + 128.0f);  // 1.5 * 2^23: the sum's low byte is 128 + integer
  for (int64_t i = 0; i < n; i += kLanes) {
    put(i, as_int(add(mul(load_upto(x + i, n - i), set1(inverse)), shift)));
  }
}

static void quantize_key(const float* x, int64_t n, int64_t slot, char* key) {
  uint8_t bytes[kMaxHeadDim + kLanes];
  quantize_head(x, n, reinterpret_cast<float*>(key) + slot,
                [&](int64_t i, Vi v)
                    __attribute__((always_inline)) { store_low_bytes(bytes + i, v); });
  char* to = key + kScaleBytes + slot * 4;
  for (int64_t d = 0; d < n; d += 4) __builtin_memcpy(to + d * 16, bytes + d, 4);
}

static void quantize_value(const float* x, int64_t n, int64_t head_dim_v, int64_t slot,
                           char* value) {
  auto* to = reinterpret_cast<uint8_t*>(value) + kScaleBytes + slot / 4 * head_dim_v * 4;
  quantize_head(x, n, reinterpret_cast<float*>(value) + slot,
                [&](int64_t i, Vi v) __attribute__((always_inline)) {
                  store_byte(to + i * 4, v, static_cast<int>(smaller(n - i, kLanes)),
                             static_cast<int>(slot % 4));
                });
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

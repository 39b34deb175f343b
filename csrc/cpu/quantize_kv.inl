// Writing an i8 cache (kv/layout.h): the scale of a token's head, and its integers.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kScaleBytes = 64;  // 16 f32 before the integers of a head

// n elements to bytes `stride` apart, their scale to *scale: max |x| / 127, NaN if one is not a
// number or infinite.
static void quantize_head(const float* x, int64_t n, int8_t* out, int64_t stride, float* scale) {
  Vf largest = zero(), nan = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf v = load_upto(x + i, n - i);
    largest = max(largest, abs(v));
    nan = fma(v, zero(), nan);  // infinity times zero is NaN too
  }
  const float peak = max_of(largest);
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  *scale = peak * (1.0f / 127.0f) + cpu::PYENGINE_ISA::sum(nan);
  const Vf shift = set1(12582912.0f);  // 1.5 * 2^23: the low byte of the sum is the integer
  for (int64_t i = 0; i < n; i += kLanes) {
    float rounded[kLanes];
    store(rounded, add(mul(load_upto(x + i, n - i), set1(inverse)), shift));
    const int64_t lanes = smaller(n - i, kLanes);
    for (int64_t l = 0; l < lanes; ++l) {
      __builtin_memcpy(out + (i + l) * stride, rounded + l, 1);  // little-endian
    }
  }
}

static void quantize_kv(const KVMemory& kv, int64_t slot, const float* keys, const float* values) {
  char* block = kv.data + slot / 16 * kv.block_bytes;
  slot %= 16;
  for (int64_t head = 0; head < kv.n_head; ++head) {
    char* key = block + head * kv.key_bytes;
    char* value = block + kv.values_at + head * kv.value_bytes;
    quantize_head(keys + head * kv.head_dim, kv.head_dim,
                  reinterpret_cast<int8_t*>(key) + kScaleBytes + slot, 16,
                  reinterpret_cast<float*>(key) + slot);
    quantize_head(values + head * kv.head_dim, kv.head_dim,
                  reinterpret_cast<int8_t*>(value) + kScaleBytes + slot * kv.head_dim_v, 1,
                  reinterpret_cast<float*>(value) + slot);
  }
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The vector vocabulary that kernels (*.inl) are written in, here in the compiler's portable
// vectors of 4 lanes: SSE2 on x86-64, NEON on aarch64.
//
// clang-format off
//   Vf, Vi            kLanes floats, kLanes 32-bit integers
//   load, store       any alignment; with n: the first n lanes only, the rest zero, nothing else touched
//   fma(a, b, c)      a * b + c, rounded once where the hardware can, else after the product
//   max, min          the second operand if either is NaN
//   keep_first        the first n lanes of a, then those of `rest`; any n
//   at_least_bits     bit i: a[i] >= b[i]
//   low_half, high_half, load_bf16, store_bf16
//                     bf16 in the halves of a word, or packed (stored rounded to nearest even)
//   store_half        bf16 of the first n lanes to the low (0) or the high (1) halves of n words
//   store_byte        the low bytes of the first n lanes (n <= kLanes) to byte 0..3 of n words
//   merge_halves      words of two bf16 from their values; the low half first
//   sum, max_of       over lanes, in a fixed order
//   transpose         kLanes x kLanes words in place
// clang-format on
//
// In each vec_*.h the constants say how kernels are tiled for its number of registers.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PYENGINE_INLINE static inline __attribute__((always_inline))

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

using Vf = float __attribute__((vector_size(16)));
using Vi = int32_t __attribute__((vector_size(16)));
using Vu = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(8)));
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kTileRows = 8;  // 8 x 2 accumulators of 32 registers
constexpr int kAttentionRows = 6;
#else
// 4 x 2 accumulators, 2 of the panel, x and its product: 12 of 16 registers
constexpr int kTileRows = 4;
constexpr int kAttentionRows = 3;
#endif
constexpr int kTileVectors = 2;
constexpr int kScoreVectors = 4;
constexpr int kValueVectors = 4;
constexpr int kSingleVectors = 4;  // of one row

PYENGINE_INLINE Vi as_int(Vf a) { return reinterpret_cast<Vi>(a); }
PYENGINE_INLINE Vf as_float(Vi a) { return reinterpret_cast<Vf>(a); }

PYENGINE_INLINE Vf set1(float a) { return Vf{a, a, a, a}; }
PYENGINE_INLINE Vi set1(int32_t a) { return Vi{a, a, a, a}; }
PYENGINE_INLINE Vf zero() { return set1(0.0f); }
PYENGINE_INLINE Vf load(const float* p) {
  Vf a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
PYENGINE_INLINE Vf load(const float* p, int n) {
  Vf a = zero();
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
PYENGINE_INLINE void store(float* p, Vf a) { __builtin_memcpy(p, &a, sizeof a); }
PYENGINE_INLINE void store(float* p, Vf a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a[i];
}
PYENGINE_INLINE Vi load_halves(const uint16_t* p) {
  Vi a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
PYENGINE_INLINE Vi load_halves(const uint16_t* p, int n) {
  uint16_t copy[2 * kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load_halves(copy);
}

PYENGINE_INLINE Vf add(Vf a, Vf b) { return a + b; }
PYENGINE_INLINE Vf sub(Vf a, Vf b) { return a - b; }
PYENGINE_INLINE Vf mul(Vf a, Vf b) { return a * b; }
PYENGINE_INLINE Vf div(Vf a, Vf b) { return a / b; }
PYENGINE_INLINE Vf fma(Vf a, Vf b, Vf c) {
#if defined(__aarch64__)
  return reinterpret_cast<Vf>(vfmaq_f32(reinterpret_cast<float32x4_t>(c),
                                        reinterpret_cast<float32x4_t>(a),
                                        reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
PYENGINE_INLINE Vf select(Vi mask, Vf yes, Vf no) {
  return as_float((mask & as_int(yes)) | (~mask & as_int(no)));
}
PYENGINE_INLINE Vf max(Vf a, Vf b) { return select(a > b, a, b); }
PYENGINE_INLINE Vf min(Vf a, Vf b) { return select(a < b, a, b); }
PYENGINE_INLINE Vf abs(Vf a) { return as_float(as_int(a) & set1(INT32_MAX)); }
PYENGINE_INLINE Vf copy_sign(Vf a, Vf sign) {
  return as_float((as_int(a) & set1(INT32_MAX)) | (as_int(sign) & set1(INT32_MIN)));
}
PYENGINE_INLINE Vf select_greater(Vf a, Vf b, Vf yes, Vf no) { return select(a > b, yes, no); }
PYENGINE_INLINE Vf keep_first(Vf a, int n, Vf rest) {
  return select(Vi{0, 1, 2, 3} < set1(n), a, rest);
}
PYENGINE_INLINE unsigned at_least_bits(Vf a, Vf b) {
  Vi bits = (a >= b) & Vi{1, 2, 4, 8};
  return static_cast<unsigned>(bits[0] | bits[1] | bits[2] | bits[3]);
}

PYENGINE_INLINE Vi add(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) + reinterpret_cast<Vu>(b));  // wraps
}
template <int kBits>
PYENGINE_INLINE Vi shift_left(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) << kBits);
}

PYENGINE_INLINE Vf low_half(Vi a) { return as_float(shift_left<16>(a)); }
PYENGINE_INLINE Vf high_half(Vi a) { return as_float(a & set1(static_cast<int32_t>(0xffff0000u))); }
PYENGINE_INLINE Vf merge_halves(Vf even, Vf odd) {
  return reinterpret_cast<Vf>(reinterpret_cast<Vu>(even) >> 16 | reinterpret_cast<Vu>(odd));
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p) {
  Halves a;
  __builtin_memcpy(&a, p, sizeof a);
  return reinterpret_cast<Vf>(__builtin_convertvector(a, Vu) << 16);
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p, int n) {
  uint16_t copy[kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load_bf16(copy);
}
PYENGINE_INLINE Halves narrow(Vf a) {
  Vu bits = reinterpret_cast<Vu>(a);
  Vi rounded = reinterpret_cast<Vi>(bits + 0x7fffu + ((bits >> 16) & 1u));
  rounded = as_int(select(a != a, as_float(as_int(a) | set1(0x400000)), as_float(rounded)));
  return __builtin_convertvector(reinterpret_cast<Vu>(rounded) >> 16, Halves);
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a) {
  Halves halves = narrow(a);
  __builtin_memcpy(p, &halves, sizeof halves);
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a, int n) {
  Halves halves = narrow(a);
  for (int i = 0; i < n; ++i) p[i] = halves[i];
}

PYENGINE_INLINE void store_half(uint16_t* words, Vf a, int n, int half) {
  Halves halves = narrow(a);
  for (int i = 0; i < n; ++i) words[2 * i + half] = halves[i];
}
PYENGINE_INLINE void store_byte(uint8_t* words, Vi a, int n, int byte) {
  for (int i = 0; i < n; ++i) words[4 * i + byte] = static_cast<uint8_t>(a[i]);
}

// f16 without hardware: the exponent is moved by a multiplication, which also makes and takes
// subnormals; 2^112 is the distance between the two exponents' biases.
PYENGINE_INLINE Vf load_f16(const uint16_t* p) {
  Halves a;
  __builtin_memcpy(&a, p, sizeof a);
  Vi bits = reinterpret_cast<Vi>(__builtin_convertvector(a, Vu));
  Vi magnitude = shift_left<13>(bits & set1(0x7fff));
  Vf scaled = mul(as_float(magnitude), set1(5.192296858534828e33f));
  Vf special = as_float(magnitude | set1(0x7f800000));  // infinity and NaN keep their fraction
  Vf value = select((bits & set1(0x7c00)) == set1(0x7c00), special, scaled);
  return as_float(as_int(value) | shift_left<16>(bits & set1(0x8000)));
}
PYENGINE_INLINE uint16_t to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude <
      0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24, rounded to even
    float f;
    __builtin_memcpy(&f, &magnitude, 4);
    f += 0.5f;
    __builtin_memcpy(&bits, &f, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(
      sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}
PYENGINE_INLINE void store_f16(uint16_t* p, Vf a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(a[i]);
}

PYENGINE_INLINE float sum(Vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
PYENGINE_INLINE float max_of(Vf a) {
  float b = a[0] > a[2] ? a[0] : a[2], c = a[1] > a[3] ? a[1] : a[3];
  return b > c ? b : c;
}

PYENGINE_INLINE void transpose(Vf r[4]) {
  Vf a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = Vf{a[0], b[0], c[0], d[0]};
  r[1] = Vf{a[1], b[1], c[1], d[1]};
  r[2] = Vf{a[2], b[2], c[2], d[2]};
  r[3] = Vf{a[3], b[3], c[3], d[3]};
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

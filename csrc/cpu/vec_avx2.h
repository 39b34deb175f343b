// The vector vocabulary in AVX2 with FMA and F16C: 8 lanes, 16 registers. See vec_baseline.h for
// what each word means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define PYENGINE_INLINE static inline __attribute__((always_inline))

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

using Vf = __m256;
using Vi = __m256i;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 of the panel, 1 of x: 15 of 16 registers
constexpr int kTileVectors = 2;
constexpr int kAttentionRows = 6;
constexpr int kScoreVectors = 2;
constexpr int kValueVectors = 2;
constexpr int kSingleVectors = 8;  // of one row

PYENGINE_INLINE Vi as_int(Vf a) { return _mm256_castps_si256(a); }
PYENGINE_INLINE Vf as_float(Vi a) { return _mm256_castsi256_ps(a); }
PYENGINE_INLINE Vi set1(int32_t a) { return _mm256_set1_epi32(a); }
PYENGINE_INLINE Vi first(int n) {
  return _mm256_cmpgt_epi32(set1(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PYENGINE_INLINE Vf zero() { return _mm256_setzero_ps(); }
PYENGINE_INLINE Vf set1(float a) { return _mm256_set1_ps(a); }
PYENGINE_INLINE Vf load(const float* p) { return _mm256_loadu_ps(p); }
PYENGINE_INLINE Vf load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
PYENGINE_INLINE void store(float* p, Vf a) { _mm256_storeu_ps(p, a); }
PYENGINE_INLINE void store(float* p, Vf a, int n) { _mm256_maskstore_ps(p, first(n), a); }
PYENGINE_INLINE Vi load_halves(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const Vi*>(p));
}
PYENGINE_INLINE Vi load_halves(const uint16_t* p, int n) {
  uint16_t copy[2 * kLanes] = {};
  __builtin_memcpy(copy, p, static_cast<size_t>(n) * 2);
  return load_halves(copy);
}

PYENGINE_INLINE Vf add(Vf a, Vf b) { return _mm256_add_ps(a, b); }
PYENGINE_INLINE Vf sub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
PYENGINE_INLINE Vf mul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
PYENGINE_INLINE Vf div(Vf a, Vf b) { return _mm256_div_ps(a, b); }
PYENGINE_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
PYENGINE_INLINE Vf max(Vf a, Vf b) { return _mm256_max_ps(a, b); }
PYENGINE_INLINE Vf min(Vf a, Vf b) { return _mm256_min_ps(a, b); }
PYENGINE_INLINE Vf abs(Vf a) { return _mm256_andnot_ps(set1(-0.0f), a); }
PYENGINE_INLINE Vf copy_sign(Vf a, Vf sign) {
  return _mm256_or_ps(abs(a), _mm256_and_ps(set1(-0.0f), sign));
}
PYENGINE_INLINE Vf select_greater(Vf a, Vf b, Vf yes, Vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
PYENGINE_INLINE Vf keep_first(Vf a, int n, Vf rest) {
  return _mm256_blendv_ps(rest, a, as_float(first(n)));
}
PYENGINE_INLINE unsigned at_least_bits(Vf a, Vf b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

PYENGINE_INLINE Vi add(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
template <int kBits>
PYENGINE_INLINE Vi shift_left(Vi a) {
  return _mm256_slli_epi32(a, kBits);
}

PYENGINE_INLINE Vf low_half(Vi a) { return as_float(_mm256_slli_epi32(a, 16)); }
PYENGINE_INLINE Vf high_half(Vi a) {
  return as_float(_mm256_and_si256(a, set1(static_cast<int32_t>(0xffff0000u))));
}
PYENGINE_INLINE Vf merge_halves(Vf even, Vf odd) {
  return as_float(_mm256_or_si256(_mm256_srli_epi32(as_int(even), 16), as_int(odd)));
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p) {
  __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p, int n) {
  uint16_t copy[kLanes] = {};
  __builtin_memcpy(copy, p, static_cast<size_t>(n) * 2);
  return load_bf16(copy);
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a) {
  Vi bits = as_int(a);
  Vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1(1));
  Vi rounded = add(add(bits, set1(0x7fff)), odd);
  Vf nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  Vf quiet = as_float(_mm256_or_si256(bits, set1(0x400000)));
  rounded = _mm256_srli_epi32(as_int(_mm256_blendv_ps(as_float(rounded), quiet, nan)), 16);
  __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a, int n) {
  uint16_t copy[kLanes];
  store_bf16(copy, a);
  __builtin_memcpy(p, copy, static_cast<size_t>(n) * 2);
}
PYENGINE_INLINE void store_half(uint16_t* words, Vf a, int n, int half) {
  uint16_t copy[kLanes];
  store_bf16(copy, a);
  for (int i = 0; i < n; ++i) words[2 * i + half] = copy[i];
}
PYENGINE_INLINE void store_byte(uint8_t* words, Vi a, int n, int byte) {
  uint8_t copy[kLanes * 4];
  _mm256_storeu_si256(reinterpret_cast<Vi*>(copy), a);
  for (int i = 0; i < n; ++i) words[4 * i + byte] = copy[4 * i];
}
PYENGINE_INLINE Vf load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYENGINE_INLINE void store_f16(uint16_t* p, Vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYENGINE_INLINE float sum(Vf a) {
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
PYENGINE_INLINE float max_of(Vf a) {
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

PYENGINE_INLINE void transpose(Vf r[8]) {
  Vf t[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // within 128-bit lanes: 4 x 4 blocks
    Vf* a = r + 4 * i;
    __m256d p0 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1]));
    __m256d p1 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
    __m256d p2 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3]));
    __m256d p3 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
    t[4 * i + 0] = _mm256_castpd_ps(_mm256_unpacklo_pd(p0, p2));
    t[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(p0, p2));
    t[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(p1, p3));
    t[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(p1, p3));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
  }
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

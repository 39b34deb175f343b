// The vector vocabulary in AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers. See vec_baseline.h for
// what each word means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define PYENGINE_INLINE static inline __attribute__((always_inline))

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

using Vf = __m512;
using Vi = __m512i;
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // 8 x 3 accumulators, 3 of the panel, 1 of x: 28 of 32 registers
constexpr int kTileVectors = 3;
constexpr int kAttentionRows = 6;
constexpr int kScoreVectors = 4;  // 6 x 4 accumulators
constexpr int kValueVectors = 4;
constexpr int kSingleVectors = 4;  // of one row

PYENGINE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
PYENGINE_INLINE Vi as_int(Vf a) { return _mm512_castps_si512(a); }
PYENGINE_INLINE Vf as_float(Vi a) { return _mm512_castsi512_ps(a); }

PYENGINE_INLINE Vf zero() { return _mm512_setzero_ps(); }
PYENGINE_INLINE Vf set1(float a) { return _mm512_set1_ps(a); }
PYENGINE_INLINE Vi set1(int32_t a) { return _mm512_set1_epi32(a); }
PYENGINE_INLINE Vf load(const float* p) { return _mm512_loadu_ps(p); }
PYENGINE_INLINE Vf load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
PYENGINE_INLINE void store(float* p, Vf a) { _mm512_storeu_ps(p, a); }
PYENGINE_INLINE void store(float* p, Vf a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
PYENGINE_INLINE Vi load_halves(const uint16_t* p) { return _mm512_loadu_si512(p); }
PYENGINE_INLINE Vi load_halves(const uint16_t* p, int n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}

PYENGINE_INLINE Vf add(Vf a, Vf b) { return _mm512_add_ps(a, b); }
PYENGINE_INLINE Vf sub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
PYENGINE_INLINE Vf mul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
PYENGINE_INLINE Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
PYENGINE_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
PYENGINE_INLINE Vf max(Vf a, Vf b) { return _mm512_max_ps(a, b); }
PYENGINE_INLINE Vf min(Vf a, Vf b) { return _mm512_min_ps(a, b); }
PYENGINE_INLINE Vf abs(Vf a) { return _mm512_abs_ps(a); }
PYENGINE_INLINE Vf copy_sign(Vf a, Vf sign) {
  return as_float(_mm512_ternarylogic_epi32(set1(INT32_MIN), as_int(sign), as_int(a), 0xca));
}
PYENGINE_INLINE Vf select_greater(Vf a, Vf b, Vf yes, Vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
PYENGINE_INLINE Vf keep_first(Vf a, int n, Vf rest) {
  return _mm512_mask_blend_ps(n >= kLanes ? __mmask16(0xffff)
                              : n <= 0    ? __mmask16(0)
                                          : first(n),
                              rest, a);
}
PYENGINE_INLINE unsigned at_least_bits(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

PYENGINE_INLINE Vi add(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
template <int kBits>
PYENGINE_INLINE Vi shift_left(Vi a) {
  return _mm512_slli_epi32(a, kBits);
}

PYENGINE_INLINE Vf low_half(Vi a) { return as_float(_mm512_slli_epi32(a, 16)); }
PYENGINE_INLINE Vf high_half(Vi a) {
  return as_float(_mm512_and_si512(a, set1(static_cast<int32_t>(0xffff0000u))));
}
PYENGINE_INLINE Vf merge_halves(Vf even, Vf odd) {
  return as_float(_mm512_or_si512(_mm512_srli_epi32(as_int(even), 16), as_int(odd)));
}
PYENGINE_INLINE Vf widen(__m256i a) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PYENGINE_INLINE Vf load_bf16(const uint16_t* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p));
}
PYENGINE_INLINE __m256i narrow(Vf a) {
  Vi bits = as_int(a);
  Vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1(1));
  Vi rounded = add(add(bits, set1(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, set1(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
PYENGINE_INLINE void store_bf16(uint16_t* p, Vf a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a));
}
PYENGINE_INLINE void store_half(uint16_t* words, Vf a, int n, int half) {
  Vi bits = _mm512_cvtepu16_epi32(narrow(a));
  bits = _mm512_sll_epi32(bits, _mm_cvtsi32_si128(16 * half));
  const uint64_t wanted = (uint64_t{1} << 2 * n) - 1;
  _mm512_mask_storeu_epi16(words, static_cast<__mmask32>(wanted & (0x55555555u << half)), bits);
}
PYENGINE_INLINE void store_byte(uint8_t* words, Vi a, int n, int byte) {
  const uint64_t wanted = n >= kLanes ? ~uint64_t{0} : (uint64_t{1} << 4 * n) - 1;
  _mm512_mask_storeu_epi8(words, wanted & (0x1111111111111111u << byte),
                          _mm512_sll_epi32(a, _mm_cvtsi32_si128(8 * byte)));
}
PYENGINE_INLINE Vf load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PYENGINE_INLINE void store_f16(uint16_t* p, Vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYENGINE_INLINE float sum(Vf a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
PYENGINE_INLINE float max_of(Vf a) {
  __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

// (rows of 16 words) -> (columns); four levels of 2 x 2 exchanges.
PYENGINE_INLINE void transpose(Vf r[16]) {
  Vf t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // within 128-bit lanes: 4 x 4 blocks
    Vf* a = r + 4 * i;
    __m512d p0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
    __m512d p1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
    __m512d p2 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
    __m512d p3 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    t[4 * i + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(p0, p2));
    t[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p0, p2));
    t[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(p1, p3));
    t[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(p1, p3));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // of whole 128-bit lanes
    Vf a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x44),
       b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xee);
    Vf c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x44);
    Vf d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xee);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[8 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#if defined(__AVX512BF16__)
// Words of two bf16: acc + odd halves' product, then + even halves' product.
PYENGINE_INLINE Vf dot_pairs(Vf acc, Vf x, Vf w) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}
#endif

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

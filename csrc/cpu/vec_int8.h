// The integer words of quantised dense layers, beside the vector vocabulary (vec_*.h).
//
// clang-format off
//   load_words        kLanes 32-bit words, any alignment
//   to_float          32-bit integers to floats
//   store_low_bytes   the low byte of each lane
//   sum_of            over lanes, wrapping
//   Inputs, Bytes     four signed inputs for every lane, and four unsigned weights in each lane, in the
//                     form that `dot` wants them
//   kSpreadsInputs    whether `inputs` reads words that spread_inputs has made of a row: two 16-bit inputs
//                     each, `half` words apart; else it reads four bytes as they lie
//   dot(acc, w, x)    acc += w[0] x[0] + … + w[3] x[3] in each lane, exact on every instruction set:
//                     vpdpbusd where there is one, else 16-bit products of the even and odd bytes
//                     (vpmaddubsw would saturate)
//   WideInputs        four signed 16-bit inputs for every lane, from two words that lie `half` words apart
//   store_wide        kLanes inputs, from the i-th on, to such words; |input| <= 32512
//   wide_dot, wide_total
//                     as `dot`, of 16-bit inputs: exact, modulo 2^32
//   Group             the (multiplier, zero point) of a group of int4 weights, for each lane
//   unpack            8 nibbles of each lane -> two words of 4 unsigned bytes, 128 + m (nibble - z)
//   AVX2 only: multiply_pairs, bytes a (unsigned) and b to 16 bits, a[0] b[0] + a[1] b[1] and so on, if
//   they fit; add_pairs, acc += these; sum_of_halves, over lanes, of the low and of the high halves
// clang-format on
#pragma once

#include <cstdint>

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

#if defined(__AVX512BW__)

PYENGINE_INLINE Vi load_words(const void* p) { return _mm512_loadu_si512(p); }
PYENGINE_INLINE void store_words(void* p, Vi a) { _mm512_storeu_si512(p, a); }
PYENGINE_INLINE Vf to_float(Vi a) { return _mm512_cvtepi32_ps(a); }
PYENGINE_INLINE void store_low_bytes(void* p, Vi a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
PYENGINE_INLINE Vi widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYENGINE_INLINE int32_t sum_of(Vi a) { return _mm512_reduce_add_epi32(a); }
PYENGINE_INLINE Vi bit_and(Vi a, Vi b) { return _mm512_and_si512(a, b); }
template <int kBits>
PYENGINE_INLINE Vi shift_right(Vi a) {
  return _mm512_srli_epi32(a, kBits);
}
PYENGINE_INLINE Vi even_signed(Vi a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
PYENGINE_INLINE Vi odd_signed(Vi a) { return _mm512_srai_epi16(a, 8); }
PYENGINE_INLINE Vi odd_unsigned(Vi a) { return _mm512_srli_epi16(a, 8); }
PYENGINE_INLINE Vi multiply_halves(Vi a, Vi b) { return _mm512_mullo_epi16(a, b); }
PYENGINE_INLINE Vi add_bytes(Vi a, Vi b) { return _mm512_add_epi8(a, b); }
PYENGINE_INLINE Vi sub_words(Vi a, Vi b) { return _mm512_sub_epi32(a, b); }
PYENGINE_INLINE Vi dot_halves(Vi a, Vi b) { return _mm512_madd_epi16(a, b); }

#elif defined(__AVX2__)

PYENGINE_INLINE Vi load_words(const void* p) {
  return _mm256_loadu_si256(static_cast<const Vi*>(p));
}
PYENGINE_INLINE void store_words(void* p, Vi a) { _mm256_storeu_si256(static_cast<Vi*>(p), a); }
PYENGINE_INLINE Vf to_float(Vi a) { return _mm256_cvtepi32_ps(a); }
PYENGINE_INLINE void store_low_bytes(void* p, Vi a) {
  const Vi bytes = _mm256_shuffle_epi8(
      a, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12,
                          -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m128i both =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), both);
}
PYENGINE_INLINE Vi widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
PYENGINE_INLINE int32_t sum_of(Vi a) {
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
PYENGINE_INLINE Vi bit_and(Vi a, Vi b) { return _mm256_and_si256(a, b); }
template <int kBits>
PYENGINE_INLINE Vi shift_right(Vi a) {
  return _mm256_srli_epi32(a, kBits);
}
PYENGINE_INLINE Vi even_signed(Vi a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
PYENGINE_INLINE Vi odd_signed(Vi a) { return _mm256_srai_epi16(a, 8); }
PYENGINE_INLINE Vi odd_unsigned(Vi a) { return _mm256_srli_epi16(a, 8); }
PYENGINE_INLINE Vi multiply_halves(Vi a, Vi b) { return _mm256_mullo_epi16(a, b); }
PYENGINE_INLINE Vi add_bytes(Vi a, Vi b) { return _mm256_add_epi8(a, b); }
PYENGINE_INLINE Vi sub_words(Vi a, Vi b) { return _mm256_sub_epi32(a, b); }
PYENGINE_INLINE Vi dot_halves(Vi a, Vi b) { return _mm256_madd_epi16(a, b); }
PYENGINE_INLINE Vi multiply_pairs(Vi a, Vi b) { return _mm256_maddubs_epi16(a, b); }
// gcc 12 adds the products of several steps before it adds them to the sum, and runs out of
// registers.
PYENGINE_INLINE void add_pairs(Vi& acc, Vi a, Vi b) {
  Vi pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(pairs) : "x"(a), "x"(b));
}
PYENGINE_INLINE int32_t sum_of_halves(Vi a) {
  __m128i b = _mm_add_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi16(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi16(b, _mm_shuffle_epi32(b, 0xb1)));
}

#else

using Shorts = int16_t __attribute__((vector_size(16)));
using UnsignedShorts = uint16_t __attribute__((vector_size(16)));
using UnsignedBytes = uint8_t __attribute__((vector_size(16)));

PYENGINE_INLINE Vi load_words(const void* p) {
  Vi a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
PYENGINE_INLINE void store_words(void* p, Vi a) { __builtin_memcpy(p, &a, sizeof a); }
PYENGINE_INLINE Vf to_float(Vi a) { return __builtin_convertvector(a, Vf); }
PYENGINE_INLINE void store_low_bytes(void* p, Vi a) {
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(a[i]);
}
PYENGINE_INLINE Vi widen_bytes(const uint8_t* p) { return Vi{p[0], p[1], p[2], p[3]}; }
PYENGINE_INLINE int32_t sum_of(Vi a) {
  const Vu u = reinterpret_cast<Vu>(a);
  return static_cast<int32_t>(u[0] + u[1] + u[2] + u[3]);
}
PYENGINE_INLINE Vi bit_and(Vi a, Vi b) { return a & b; }
template <int kBits>
PYENGINE_INLINE Vi shift_right(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) >> kBits);
}
PYENGINE_INLINE Vi even_signed(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(a) << 8) >>
                              8);
}
PYENGINE_INLINE Vi odd_signed(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<Shorts>(a) >> 8);
}
PYENGINE_INLINE Vi odd_unsigned(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<UnsignedShorts>(a) >> 8);
}
PYENGINE_INLINE Vi multiply_halves(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<UnsignedShorts>(a) *
                              reinterpret_cast<UnsignedShorts>(b));
}
PYENGINE_INLINE Vi add_bytes(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<UnsignedBytes>(a) +
                              reinterpret_cast<UnsignedBytes>(b));
}
PYENGINE_INLINE Vi sub_words(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) - reinterpret_cast<Vu>(b));
}
// Neighbouring 16-bit products, added; the low and high halves of each word.
PYENGINE_INLINE Vi dot_halves(Vi a, Vi b) {
#if defined(__SSE2__)
  using Eight = short __attribute__((vector_size(16)));
  return reinterpret_cast<Vi>(
      __builtin_ia32_pmaddwd128(reinterpret_cast<Eight>(a), reinterpret_cast<Eight>(b)));
#else
  const Vi low = (reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) << 16) >> 16) *
                 (reinterpret_cast<Vi>(reinterpret_cast<Vu>(b) << 16) >> 16);
  return low + (a >> 16) * (b >> 16);
#endif
}

#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

using Bytes = Vi;
PYENGINE_INLINE Bytes bytes(Vi words) { return words; }
constexpr bool kSpreadsInputs = false;
PYENGINE_INLINE void spread_inputs(const int32_t*, int64_t, int32_t*) {}
#if defined(__AVX512VNNI__)
using Inputs = const int32_t*;
PYENGINE_INLINE Inputs inputs(const int32_t* word, int64_t) { return word; }
// gcc 12 moves sums that are written as intrinsics from register to register between the steps of a
// loop, which halves its speed.
PYENGINE_INLINE void dot(Vi& acc, Bytes w, Inputs x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
}
#else
using Inputs = Vi;
PYENGINE_INLINE Inputs inputs(const int32_t* word, int64_t) { return set1(*word); }
PYENGINE_INLINE void dot(Vi& acc, Bytes w, Inputs x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
}
#endif

// Inputs as 256 high + low, bytes both.
struct WideInputs {
  Vi high, low;
};
struct WideSum {
  Vi high = set1(0), low = set1(0);
};
PYENGINE_INLINE WideInputs wide_inputs(const int32_t* words, int64_t half) {
  return {set1(words[0]), set1(words[half])};
}
PYENGINE_INLINE void dot_bytes(Vi& acc, Vi w, Vi x) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
#endif
}
PYENGINE_INLINE void wide_dot(WideSum& acc, Bytes w, const WideInputs& x) {
  dot_bytes(acc.high, w, x.high);
  dot_bytes(acc.low, w, x.low);
}
PYENGINE_INLINE Vi wide_total(const WideSum& a) { return add(shift_left<8>(a.high), a.low); }
PYENGINE_INLINE void store_wide(int32_t* words, int64_t half, int64_t i, Vi inputs) {
  store_low_bytes(reinterpret_cast<char*>(words) + i, shift_right<8>(add(inputs, set1(128))));
  store_low_bytes(reinterpret_cast<char*>(words + half) + i, inputs);
}

#else

struct Inputs {
  Vi even, odd;
};
struct Bytes {
  Vi even, odd;
};
constexpr bool kSpreadsInputs = true;
PYENGINE_INLINE void spread_inputs(const int32_t* row, int64_t half, int32_t* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const Vi x = load_words(row + i);
    store_words(out + i, even_signed(x));
    store_words(out + half + i, odd_signed(x));
  }
}
PYENGINE_INLINE Inputs inputs(const int32_t* word, int64_t half) {
  return {set1(word[0]), set1(word[half])};
}
PYENGINE_INLINE Bytes bytes(Vi words) {
  return {bit_and(words, set1(0x00ff00ff)), odd_unsigned(words)};
}
PYENGINE_INLINE void dot(Vi& acc, Bytes w, Inputs x) {
#if defined(__AVX2__) && !defined(__AVX512BW__)  // as add_pairs
  Vi product;
  asm("vpmaddwd %4, %2, %1\n\tvpaddd %1, %0, %0\n\tvpmaddwd %5, %3, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(w.even), "x"(w.odd), "x"(x.even), "x"(x.odd));
#else
  acc = add(acc, add(dot_halves(w.even, x.even), dot_halves(w.odd, x.odd)));
#endif
}

using WideInputs = Inputs;
struct WideSum {
  Vi sum = set1(0);
};
PYENGINE_INLINE WideInputs wide_inputs(const int32_t* words, int64_t half) {
  return inputs(words, half);
}
PYENGINE_INLINE void wide_dot(WideSum& acc, const Bytes& w, const WideInputs& x) {
  dot(acc.sum, w, x);
}
PYENGINE_INLINE Vi wide_total(const WideSum& a) { return a.sum; }
PYENGINE_INLINE void store_wide(int32_t* words, int64_t half, int64_t i, Vi inputs) {
  uint32_t q[kLanes];
  store_words(q, inputs);
  for (int k = 0; k < kLanes; k += 4) {
    words[(i + k) / 4] = static_cast<int32_t>((q[k] & 0xffff) | q[k + 2] << 16);
    words[half + (i + k) / 4] = static_cast<int32_t>((q[k + 1] & 0xffff) | q[k + 3] << 16);
  }
}

#endif

struct Group {
  Vi multiplier;  // m in both halves of each word
  Vi offset;      // 128 - m z in all four bytes, modulo 256
};

// p: a byte m + 16 z for each of kLanes columns.
PYENGINE_INLINE Group load_group(const uint8_t* p) {
  const Vi both = widen_bytes(p), m = bit_and(both, set1(15));
  const Vi offset =
      bit_and(sub_words(set1(128), multiply_halves(m, shift_right<4>(both))), set1(255));
  const Vi twice = add(offset, shift_left<8>(offset));
  return {add(m, shift_left<16>(m)), add(twice, shift_left<16>(twice))};
}

// Nibble times m is below 256, so one 16-bit product serves two bytes.
PYENGINE_INLINE void unpack(Vi nibbles, const Group& g, Vi& low, Vi& high) {
  const Vi mask = set1(0x0f0f0f0f);
  low = add_bytes(multiply_halves(bit_and(nibbles, mask), g.multiplier), g.offset);
  high = add_bytes(multiply_halves(bit_and(shift_right<4>(nibbles), mask), g.multiplier), g.offset);
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

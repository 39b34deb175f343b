// Reading a QuantizedMatrix: a lane's part of a piece, and its weights as numbers. The integers are
// exact in every type: -225 to 225 at most, and bfloat16 has all integers up to 256.
#pragma once

#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/types.h"

namespace pyengine::cuda {

constexpr int kPieceColumns = 16, kPieceDepth = 64, kGroupBytes = 32;  // of a piece

__device__ inline int pieces_along_k(const QuantizedMatrix& w) {
  return static_cast<int>((w.k + kPieceDepth - 1) / kPieceDepth);
}

// Integers become numbers by setting the low bits of one whose last place is 1: 1024 in float16,
// 128 in bfloat16, two to a word; 2^23 in float32.
template <class T>
constexpr uint32_t kBase = std::is_same_v<T, f16> ? 0x64006400u : 0x43004300u;

__device__ inline float small_float(uint32_t integer) {
  return __uint_as_float(0x4b000000u | integer) - 8388608.0f;
}

struct Int8 {
  static constexpr int kBytes = 1024;  // of a piece
  static constexpr bool kHasGroups = false;

  struct Eight {  // k's of one column
    uint32_t word[2];

    template <class T>
    __device__ void pairs(uint32_t (&out)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t two = __byte_perm(word[i / 2], 0, i % 2 == 0 ? 0x4140 : 0x4342);
        if constexpr (std::is_same_v<T, f16>) {
          out[i] = pair_difference<T>(kBase<T> | two, 0x64806480u);  // 1024 + 128
        } else {
          // 128 and the low seven bits, less 128 if the eighth is set, else 256.
          out[i] =
              pair_difference<T>(kBase<T> | (two & 0x007f007fu), 0x43804380u ^ (two & 0x00800080u));
        }
      }
    }
    __device__ void floats(float (&out)[8]) const {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] = small_float(word[i / 4] >> (i % 4 * 8) & 255u) - 128.0f;
      }
    }
  };

  // k's 32 j + 8 t to + 7 of columns g and g + 8. `integers` and `groups` are where those of the
  // piece begin, in global or shared memory.
  struct Half {
    Eight column[2];
  };
  __device__ static Half half(const uint8_t* integers, const uint8_t*, int lane, int j) {
    const uint4 v = *reinterpret_cast<const uint4*>(integers + j * 512 + lane * 16);
    return {{{{v.x, v.y}}, {{v.z, v.w}}}};
  }
  // Both halves.
  __device__ void load(const uint8_t* integers, const uint8_t* groups, int lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) half_[j] = half(integers, groups, lane, j);
  }
  __device__ Half half(int j) const { return half_[j]; }  // j is a constant

 private:
  Half half_[2];
};

struct Int4 {
  static constexpr int kBytes = 512;
  static constexpr bool kHasGroups = true;

  struct Eight {
    uint32_t word, group;  // the group: the low eight bits

    template <class T>
    __device__ void pairs(uint32_t (&out)[4]) const {
      const uint32_t zero = kBase<T> | (group >> 4 & 15u) * 0x00010001u;
      const uint32_t multiplier =
          pair_difference<T>(kBase<T> | (group & 15u) * 0x00010001u, kBase<T>);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t two = kBase<T> | (word >> (4 * i) & 0x000f000fu);
        out[i] = pair_product<T>(pair_difference<T>(two, zero), multiplier);
      }
    }
    __device__ void floats(float (&out)[8]) const {
      const float zero = small_float(group >> 4 & 15u), multiplier = small_float(group & 15u);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t nibble = word >> (i / 2 * 4 + i % 2 * 16) & 15u;
        out[i] = multiplier * (small_float(nibble) - zero);
      }
    }
  };

  struct Half {
    Eight column[2];
  };
  __device__ static Half half(const uint8_t* integers, const uint8_t* groups, int lane, int j) {
    const uint2 v = *reinterpret_cast<const uint2*>(integers + lane * 16 + j * 8);
    const uint32_t group = *reinterpret_cast<const uint16_t*>(groups + lane / 4 * 4 + j * 2);
    return {{{v.x, group}, {v.y, group >> 8}}};
  }
  __device__ void load(const uint8_t* integers, const uint8_t* groups, int lane) {
    const uint4 v = *reinterpret_cast<const uint4*>(integers + lane * 16);
    word_[0] = v.x, word_[1] = v.y, word_[2] = v.z, word_[3] = v.w;
    groups_ = *reinterpret_cast<const uint32_t*>(groups + lane / 4 * 4);
  }
  __device__ Half half(int j) const {
    return {{{word_[2 * j], groups_ >> 16 * j}, {word_[2 * j + 1], groups_ >> (16 * j + 8)}}};
  }

 private:
  uint32_t word_[4], groups_;
};

template <class Integers>
__device__ inline const uint8_t* integers_at(const QuantizedMatrix& w, int64_t piece) {
  return w.integers + piece * Integers::kBytes;
}
template <class Integers>
__device__ inline const uint8_t* groups_at(const QuantizedMatrix& w, int64_t piece) {
  return Integers::kHasGroups ? w.groups + piece * kGroupBytes : nullptr;
}

// f(Tag<Int8 or Int4>())
template <class F>
void with_integers(const QuantizedMatrix& w, F&& f) {
  if (w.groups != nullptr) return f(Tag<Int4>());
  f(Tag<Int8>());
}

}  // namespace pyengine::cuda

// Weights to integers (ops::quantize). Lanes run over the 16 columns of a tile. Every product and
// sum is rounded by itself and every sum over k has one order, so that all instruction sets give
// the same bits: no fma here.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

PYENGINE_INLINE Vf round_to_integer(Vf x) {
  return sub(add(x, set1(kRoundShift)), set1(kRoundShift));
}
PYENGINE_INLINE Vi small_integer(Vf x) {  // x is an integer
  return sub_words(as_int(add(x, set1(kRoundShift))), as_int(set1(kRoundShift)));
}

// 1 / x, or 0 where x is too small to be divided by.
PYENGINE_INLINE Vf inverse_or_zero(Vf x) {
  return select_greater(x, set1(1e-30f), div(set1(1.0f), x), zero());
}

// strips[t][k][16] = factor[k] w[k][16 (tile0 + t) + c], zero outside the matrix.
static void gather_strips(const QuantizeJob& j, int64_t tile0, int64_t tiles, int64_t padded,
                          float* strips) {
  const int64_t k_count = j.in_features, columns = j.out_features;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t k = k_count; k < padded; ++k) {
      for (int v = 0; v < kTileVecs; ++v)
        store(strips + (t * padded + k) * 16 + v * kLanes, zero());
    }
  }
  if (j.is_in_out) {
    for (int64_t k = 0; k < k_count; ++k) {  // all tiles of a row together: one page of memory
      const Vf f = set1(j.factor != nullptr ? j.factor[k] : 1.0f);
      for (int64_t i = 0; i < tiles * 16; i += kLanes) {
        const int64_t column = tile0 * 16 + i, left = columns - column;
        const Vf w = left > 0 ? load_as_f32(j.w, j.dtype, k * columns + column, left) : zero();
        store(strips + (i / 16 * padded + k) * 16 + i % 16, mul(w, f));
      }
    }
    return;
  }
  for (int64_t i = 0; i < tiles * 16; i += kLanes) {
    float* strip = strips + i / 16 * padded * 16 + i % 16;
    for (int64_t k = 0; k < k_count; k += kLanes) {
      Vf square[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int64_t column = tile0 * 16 + i + l;
        square[l] = column < columns ? load_as_f32(j.w, j.dtype, column * k_count + k, k_count - k)
                                     : zero();
      }
      transpose(square);
      for (int64_t l = 0; l < kLanes && k + l < k_count; ++l) {
        store(strip + (k + l) * 16,
              j.factor != nullptr ? mul(square[l], set1(j.factor[k + l])) : square[l]);
      }
    }
  }
}

// max |w| of kLanes columns; false if one is NaN or infinite.
static bool column_maxima(const float* strip, int64_t padded, Vf* highest_out) {
  Vf highest = zero(), bad = zero();
  for (int64_t k = 0; k < padded; ++k) {
    const Vf w = load(strip + k * 16);
    highest = max(abs(w), highest);
    bad = add(bad, mul(w, zero()));
  }
  *highest_out = highest;
  return sum(bad) == 0.0f;
}

static bool quantize_int8(const float* strip, int64_t padded, uint8_t* out, float* scale) {
  Vf highest;
  if (!column_maxima(strip, padded, &highest)) return false;
  const Vf step = div(highest, set1(127.0f)), inverse = inverse_or_zero(step);
  store(scale, step);
  for (int64_t k = 0; k < padded; k += 4, out += kLineBytes) {
    Vi word = set1(0);
    for (int i = 3; i >= 0; --i) {
      const Vf w = load(strip + (k + i) * 16);
      const Vf q = max(set1(-127.0f), min(set1(127.0f), round_to_integer(mul(w, inverse))));
      word = add(shift_left<8>(word), add(small_integer(q), set1(128)));
    }
    store_words(out, word);
  }
  return true;
}

// What a group of kNibbleGroup weights, in units of their column, becomes: m (q - z), 0 <= q <= 15.
struct GroupFit {
  Vf multiplier, zero_point, error;
};

// The squared error of m and z; the q's too, unless `nibbles` is null.
PYENGINE_INLINE Vf group_error(const float* strip, Vf m, Vf z, float* nibbles) {
  const Vf inverse = div(set1(1.0f), m);
  const Vf least = sub(zero(), z), most = sub(set1(15.0f), z);
  Vf error = zero();
  for (int k = 0; k < kNibbleGroup; ++k) {
    const Vf w = load(strip + k * 16);
    const Vf q = max(least, min(most, round_to_integer(mul(w, inverse))));
    if (nibbles != nullptr) store(nibbles + k * kLanes, add(q, z));
    const Vf d = sub(w, mul(q, m));
    error = add(error, mul(d, d));
  }
  return error;
}

// The best of three zero points and four multipliers, the largest of which clips nothing.
static GroupFit fit_group(const float* strip) {
  Vf low = zero(), high = zero();
  for (int k = 0; k < kNibbleGroup; ++k) {
    const Vf w = load(strip + k * 16);
    low = min(w, low);
    high = max(w, high);
  }
  const Vf below = sub(zero(), low);
  const Vf share = mul(below, inverse_or_zero(add(below, high)));
  const Vf nearest = round_to_integer(mul(share, set1(15.0f)));
  const Vf middle = max(set1(5.0f), min(set1(10.0f), nearest));  // 4 and 11 are tried, too
  GroupFit best = {set1(1.0f), set1(8.0f), set1(__builtin_inff())};
  for (int dz = -1; dz <= 1; ++dz) {
    const Vf z = add(middle, set1(static_cast<float>(dz)));
    const Vf rest = sub(set1(15.0f), z);
    // m (q - z) is to lie in -127 to 127.
    const Vf limit = round_to_integer(sub(div(set1(127.0f), max(z, rest)), set1(0.5f)));
    const Vf whole = max(div(below, z), div(high, rest));
    const Vf first_m = round_to_integer(add(whole, set1(0.5f)));
    for (int dm = 0; dm < 4; ++dm) {
      const Vf wanted = sub(first_m, set1(static_cast<float>(dm)));
      const Vf m = max(set1(1.0f), min(limit, wanted));
      const Vf error = group_error(strip, m, z, nullptr);
      best.multiplier = select_greater(best.error, error, m, best.multiplier);
      best.zero_point = select_greater(best.error, error, z, best.zero_point);
      best.error = min(error, best.error);
    }
  }
  return best;
}

static bool quantize_int4(float* strip, int64_t padded, uint8_t* out, uint8_t* group,
                          float* scale) {
  Vf highest;
  if (!column_maxima(strip, padded, &highest)) return false;
  const Vf unit = div(highest, set1(120.0f));  // 120 = 8 * 15, the largest m (q - z) on one side
  store(scale, unit);
  const Vf inverse = inverse_or_zero(unit);
  for (int64_t k = 0; k < padded; ++k) store(strip + k * 16, mul(load(strip + k * 16), inverse));
  for (int64_t k = 0; k < padded; k += kNibbleGroup, group += ops::kTileColumns) {
    const float* w = strip + k * 16;
    const GroupFit fit = fit_group(w);
    float nibbles[kNibbleGroup * kLanes];
    group_error(w, fit.multiplier, fit.zero_point, nibbles);
    const Vi z = small_integer(fit.zero_point);
    store_low_bytes(group, add(small_integer(fit.multiplier), shift_left<4>(z)));
    for (int line = 0; line < kNibbleGroup / 8; ++line, out += kLineBytes) {
      Vi word = set1(0);
      for (int i = 3; i >= 0; --i) {
        const float* low = nibbles + (line * 8 + i) * kLanes;
        const Vi high_nibble = small_integer(load(low + 4 * kLanes));
        const Vi byte = add(small_integer(load(low)), shift_left<4>(high_nibble));
        word = add(shift_left<8>(word), byte);
      }
      store_words(out, word);
    }
  }
  return true;
}

static bool quantize_tiles(const QuantizeJob& j, int64_t tile0, int64_t tiles, float* scratch) {
  const int64_t padded = RowLayout(j.in_features).inputs;
  gather_strips(j, tile0, tiles, padded, scratch);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t tile = tile0 + t;
    float scale[16];
    for (int c = 0; c < 16; c += kLanes) {
      float* strip = scratch + t * padded * 16 + c;
      const bool finite =
          j.group == nullptr
              ? quantize_int8(strip, padded, j.data + tile * padded * 16 + c * 4, scale + c)
              : quantize_int4(strip, padded, j.data + tile * padded * 8 + c * 4,
                              j.group + tile * (padded / kNibbleGroup * 16) + c, scale + c);
      if (!finite) return false;
    }
    for (int64_t c = 0; c < 16 && tile * 16 + c < j.out_features; ++c) {
      j.scale[tile * 16 + c] = scale[c];
    }
  }
  return true;
}

static float row_rms(const void* w, DType dtype, int64_t row, int64_t n) {
  Vf acc[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) acc[v] = zero();
  for (int64_t i = 0; i < n; i += 16) {
    for (int v = 0; v < kTileVecs && i + v * kLanes < n; ++v) {
      const int64_t at = i + v * kLanes;
      const Vf a = load_as_f32(w, dtype, row * n + at, n - at);
      acc[v] = add(acc[v], mul(a, a));
    }
  }
  float sums[16], total = 0.0f;
  for (int v = 0; v < kTileVecs; ++v) store(sums + v * kLanes, acc[v]);
  for (const float s : sums) total += s;
  return __builtin_sqrtf(total / static_cast<float>(n));
}

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

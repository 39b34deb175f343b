// exp, erf and the activations on vectors, to about one unit in the last place; first, what all
// kernels use.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

PYENGINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYENGINE_INLINE Vf load_upto(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load(p, static_cast<int>(n));
}
PYENGINE_INLINE void store_upto(float* p, Vf a, int64_t n) {
  if (n >= kLanes) {
    store(p, a);
  } else {
    store(p, a, static_cast<int>(n));
  }
}

// exp(x) = 2^n e^r, |r| <= ln 2 / 2: Cephes' polynomial. 0 below -87.7, infinity above 88.4, NaN
// for NaN.
PYENGINE_INLINE Vf exp(Vf x) {
  x = max(set1(-88.0f), min(set1(89.0f), x));  // in this order NaN stays
  const Vf shift = set1(12582912.0f);          // 1.5 * 2^23: adding it rounds to an integer
  Vf t = fma(x, set1(1.44269504f), shift);
  Vf n = sub(t, shift);
  Vf r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in 9 bits
  r = fma(n, set1(2.12194440e-4f), r);
  Vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  // The low bits of t are n; n = -127 gives 0 and n = 128 infinity.
  return mul(p, as_float(add(shift_left<23>(as_int(t)), set1(0x3f800000))));
}

// 2^x for x <= 0, relative error below 1e-7; 0 below -126.5, NaN for NaN.
PYENGINE_INLINE Vf exp2_nonpositive(Vf x) {
  x = max(set1(-127.0f), x);  // in this order NaN stays
  const Vf shift = set1(12582912.0f);
  const Vf t = add(x, shift);
  const Vf r = sub(x, sub(t, shift));  // exact, |r| <= 1/2
  Vf p = set1(1.5345812e-4f);          // minimax for the relative error on [-1/2, 1/2]
  p = fma(p, r, set1(1.3399931e-3f));
  p = fma(p, r, set1(9.6184890e-3f));
  p = fma(p, r, set1(5.5503288e-2f));
  p = fma(p, r, set1(2.4022647e-1f));
  p = fma(p, r, set1(6.9314721e-1f));
  p = fma(p, r, set1(1.0f));
  return mul(p, as_float(add(shift_left<23>(as_int(t)), set1(0x3f800000))));
}

// Two polynomials joined at 475/512, as in N. Juffa's erff (1 ulp).
PYENGINE_INLINE Vf erf(Vf x) {
  Vf a = abs(x), s = mul(x, x);
  Vf big = fma(set1(-1.72853470e-5f), a, set1(3.83197126e-4f));
  Vf u = fma(set1(-3.88396438e-3f), a, set1(2.42546219e-2f));
  big = fma(big, s, u);
  big = fma(big, a, set1(-1.06777877e-1f));
  big = fma(big, a, set1(-6.34846687e-1f));
  big = fma(big, a, set1(-1.28717512e-1f));
  big = fma(big, a, sub(zero(), a));
  big = copy_sign(sub(set1(1.0f), exp(big)), x);
  Vf small = set1(-5.96761703e-4f);
  small = fma(small, s, set1(4.99119423e-3f));
  small = fma(small, s, set1(-2.67681349e-2f));
  small = fma(small, s, set1(1.12819925e-1f));
  small = fma(small, s, set1(-3.76125336e-1f));
  small = fma(small, s, set1(1.28379166e-1f));
  small = fma(small, x, x);
  return select_greater(a, set1(0.927734375f), big, small);
}

PYENGINE_INLINE Vf silu(Vf x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), which loses nothing where tanh u is near -1.
PYENGINE_INLINE Vf gelu_tanh(Vf x) {
  Vf cubic = fma(mul(mul(x, x), set1(0.044715f)), x, x);
  return div(x, add(set1(1.0f), exp(mul(cubic, set1(-1.5957691216f)))));  // -2 sqrt(2 / pi)
}

PYENGINE_INLINE Vf gelu_erf(Vf x) {
  Vf half = mul(x, set1(0.5f));
  return fma(half, erf(mul(x, set1(0.70710678f))), half);
}

PYENGINE_INLINE Vf relu(Vf x) { return max(zero(), x); }

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

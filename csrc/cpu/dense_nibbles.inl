// int4 layers without vpdpbusd (AVX2): the integers of dense_quant.inl, from nibbles as they lie.
//
// A group of kNibbleGroup k's of a column adds m (sum of q (nibble - z)). Products of a nibble and
// an input are small, so vpmaddubsw cannot saturate (2 * 15 * 127), and the sums of a whole group
// fit into 16 bits: 16 * 15 * 127 in each half of a word, of (nibble - z) as of nibbles. The
// multiplier enters once for a group, where halves become words. That is half the instructions of
// unpacked bytes.

namespace pyengine::cpu::PYENGINE_ISA {
namespace {

constexpr int64_t kGroupWords = kNibbleGroup / 4;  // of inputs
static_assert(kGroupWords == kLanes, "a vector holds a group's inputs");

template <int kRows>
static void dot_nibbles(const QuantTile& t, const RowLayout& layout) {
  const uint8_t* w = t.w;
  const uint8_t* group = t.group;
  const Vi mask = set1(0x0f0f0f0f), low_byte = set1(15);
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = g * (kInputGroup / kNibbleGroup);
    const int64_t end = smaller(begin + kInputGroup / kNibbleGroup, layout.inputs / kNibbleGroup);
    Vi acc[kRows][kTileVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) acc[r][v] = set1(0);
    }
    for (int64_t i = begin; i < end; ++i) {
      Vi multiplier[kTileVecs], halves[kRows][kTileVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        const Vi both = widen_bytes(group + v * kLanes), z = shift_right<4>(both);
        const Vi m = bit_and(both, low_byte), zeros = add(z, shift_left<16>(z));
        multiplier[v] = add(m, shift_left<16>(m));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          halves[r][v] = multiply_halves(zeros, set1(t.x[r * t.ldx + i]));
        }
      }
      group += ops::kTileColumns;
      const int32_t* x = t.rows + i * kGroupWords;
#pragma GCC unroll 4
      for (int line = 0; line < kNibbleGroup / 8; ++line, w += kLineBytes) {
        if (t.prefetch) __builtin_prefetch(w + kLinesAhead * kLineBytes, 0, 3);
#pragma GCC unroll 2
        for (int high = 0; high < 2; ++high) {
          Vi nibbles[kTileVecs];
#pragma GCC unroll 2
          for (int v = 0; v < kTileVecs; ++v) {
            const Vi both = load_words(w + v * kLanes * 4);
            nibbles[v] = bit_and(high ? shift_right<4>(both) : both, mask);
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const Vi in = set1(x[r * layout.words + 2 * line + high]);
#pragma GCC unroll 2
            for (int v = 0; v < kTileVecs; ++v) {
              add_pairs(halves[r][v], nibbles[v], in);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kTileVecs; ++v) {
          acc[r][v] = add(acc[r][v], dot_halves(halves[r][v], multiplier[v]));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vf scale = set1(layout.scales(t.rows + r * layout.words)[g]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        float* y = t.y + r * t.ldy + v * kLanes;
        store(y, fma(scale, to_float(acc[r][v]), g == 0 ? zero() : load(y)));
      }
    }
  }
}

// For each group of k's, a word: minus the sum of inputs 0, 1, 4, 5, 8, ... and minus that of the
// others, which zero points multiply.
struct LayerNibbles {
  static constexpr bool kNibbles = true, kUnpacks = false;
  static int64_t spread_words(const RowLayout& layout) { return layout.inputs / kNibbleGroup; }
  static void spread(const int32_t* row, const RowLayout& layout, int32_t* out) {
    const Vi ones = set1(0x01010101);
    for (int64_t i = 0; i < layout.inputs / kNibbleGroup; ++i) {
      const Vi sums = multiply_pairs(ones, load_words(row + i * kGroupWords));
      out[i] = sum_of_halves(multiply_halves(sums, set1(-1)));
    }
  }
  template <int kRows>
  PYENGINE_INLINE void multiply(const QuantTile& t, const RowLayout& layout) {
    dot_nibbles<kRows>(t, layout);
  }
};

constexpr DenseKernels kDenseInt4 = quant_kernels<LayerNibbles>();

}  // namespace
}  // namespace pyengine::cpu::PYENGINE_ISA

// The table of this instruction set's kernels.

namespace pyengine::cpu::PYENGINE_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {
      PYENGINE_ISA_NAME, kDenseF32,      kDenseBf16,      kDenseInt8,     kDenseInt4,
      kAttentionF32,     kAttentionBf16, kAttentionI8,    layer_norm_row, add_rows,
      convert,           max_sum_exp,    select_at_least, quantize_tiles, row_rms,
      block_maxima,      exp_weights,    sums_above,      keep_above,     select_between};
  return table;
}

}  // namespace pyengine::cpu::PYENGINE_ISA

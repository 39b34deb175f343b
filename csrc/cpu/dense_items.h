// How a dense layer is cut into work items: over columns and, when there are many, rows; never over
// k.
#pragma once

#include "cpu/kernels.h"
#include "ops/ops.h"

namespace pyengine::cpu {

struct DenseItems {
  int64_t rows = 0, cols = 0;  // of one item at most
  int64_t row_items = 0, col_items = 0;
  int64_t total_rows = 0, total_cols = 0;

  int64_t count() const { return row_items * col_items; }
  // Items that share columns are neighbours, so that their weights are still in a cache.
  int64_t row0(int64_t item) const { return item % row_items * rows; }
  int64_t col0(int64_t item) const { return item / row_items * cols; }
  int64_t row1(int64_t item) const;
  int64_t col1(int64_t item) const;
};

// Items of `max_rows` rows at most, for `threads` workers.
DenseItems cut_dense(int64_t unit, int64_t rows, int64_t cols, int64_t max_rows, int threads);

// The kernels for weights of that dtype and layout; InternalError if there are none.
const DenseKernels& dense_kernels(const Kernels& kernels, const ops::Weight& w);

// A job for x w + bias with x in the form that the kernels read; scratch comes from ctx.arena.
DenseJob prepare_dense(ExecContext& ctx, const void* x, int64_t rows, const ops::Weight& w,
                       const float* bias);

}  // namespace pyengine::cpu

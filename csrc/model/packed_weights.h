// Dense weights on their way from a checkpoint to the packed layout (ops/types.h).
//
// Reading a file in place starts a process soonest, reading packed weights runs it fastest. Both
// give the same bits, so a model starts on the file and changes over matrix by matrix, between two
// steps. What a packed matrix was read from is given back, so that no weight is in memory twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "ops/ops.h"

namespace pyengine {

class PackedWeights {
 public:
  // Weights will be packed in `dtype`, which the kernels must have (f32 or bf16).
  explicit PackedWeights(DType dtype) : dtype_(dtype) {}

  // `weight`, of any dtype and not packed, becomes a packed one of `dtype` in time. It stays where
  // it is, and so does what it points to.
  void add(ops::Weight* weight) { pending_.push_back(weight); }

  // Packs those of another dtype, which cannot be computed with as they are. No add() afterwards.
  // Throws OutOfMemory.
  void convert(ExecContext& ctx);

  // Packs whole matrices until `bytes` are packed or none is left. Does without, for ever, where
  // there is no memory for them.
  void advance(ExecContext& ctx, size_t bytes);

  bool done() const { return pending_.empty(); }
  size_t bytes() const { return used_; }  // of the matrices packed so far

 private:
  void reserve();
  size_t bytes_of(const ops::Weight& w) const;
  void pack_next(ExecContext& ctx);

  DType dtype_;
  std::vector<ops::Weight*> pending_;
  AlignedBuffer buffer_;  // pages that nothing was packed into take no memory
  size_t used_ = 0;
};

}  // namespace pyengine

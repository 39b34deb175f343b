#include "model/packed_weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "core/errors.h"
#include "core/file_guard.h"

namespace pyengine {

namespace {

// The pages of a file go back to the system; they return, from its cache, if they are read again.
// Memory that is not a watched file is left alone: its pages would come back as zeros.
void give_back(const void* data, size_t bytes) {
  if (bytes == 0 || FileGuard::find(data) == nullptr) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

size_t PackedWeights::bytes_of(const ops::Weight& w) const {
  return static_cast<size_t>(ops::packed_words(dtype_, w.in_features, w.out_features)) * 4;
}

// Leaves the matrix as it was, and waiting, if it throws.
void PackedWeights::pack_next(ExecContext& ctx) {
  ops::Weight& w = *pending_.front();
  std::byte* const out = buffer_.bytes() + used_;
  // The head is a third of the smallest GPT-2: what is both here and there at once stays small.
  constexpr int64_t kPieceBytes = int64_t{32} << 20;
  const auto row_bytes = static_cast<int64_t>(size_of(w.dtype)) * w.in_features;
  int64_t piece = w.out_features;
  if (w.layout == ops::WeightLayout::out_in) {
    piece = std::max<int64_t>(kPieceBytes / row_bytes / ops::kTileColumns, 1) * ops::kTileColumns;
  }
  for (int64_t n = 0; n < w.out_features; n += piece) {
    ops::Weight part = w;
    part.data = static_cast<const std::byte*>(w.data) + n * row_bytes;
    part.out_features = std::min(piece, w.out_features - n);
    ops::pack(ctx, part, dtype_, out + ops::packed_words(dtype_, w.in_features, n) * 4);
    give_back(part.data, static_cast<size_t>(part.out_features * row_bytes));
  }
  used_ += bytes_of(w);
  w.data = out;
  w.dtype = dtype_;
  w.layout = ops::WeightLayout::packed;
  pending_.erase(pending_.begin());
}

void PackedWeights::reserve() {
  if (buffer_.size() > 0) return;
  size_t total = 0;
  for (const ops::Weight* w : pending_) total += bytes_of(*w);
  buffer_ = AlignedBuffer(total);
}

void PackedWeights::convert(ExecContext& ctx) {
  const auto others = std::stable_partition(
      pending_.begin(), pending_.end(), [&](const ops::Weight* w) { return w->dtype != dtype_; });
  if (others == pending_.begin()) return;
  const auto num_left = static_cast<size_t>(pending_.end() - others);
  reserve();
  while (pending_.size() > num_left) pack_next(ctx);
}

void PackedWeights::advance(ExecContext& ctx, size_t bytes) {
  if (pending_.empty()) return;
  try {
    reserve();
  } catch (const OutOfMemory&) {
    pending_.clear();
    return;
  }
  const size_t goal = used_ + bytes;
  while (!pending_.empty() && used_ < goal) pack_next(ctx);
}

}  // namespace pyengine

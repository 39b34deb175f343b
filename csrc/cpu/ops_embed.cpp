// embed of ops.h: rows of a table in whatever layout it lies.
#include <algorithm>
#include <cstring>

#include "cpu/dense_items.h"

namespace pyengine::ops {
namespace {

constexpr int64_t kItemRows = 16;  // a row of 768 channels takes a few hundred cycles

// Row `id` of packed weights, that is column `id` of the head's matrix: a word from each line of
// its tile. The prefetcher follows them.
void read_packed(const Weight& wte, int64_t id, void* row) {
  const int64_t words = packed_column_words(wte.dtype, wte.in_features);
  const auto* from = static_cast<const uint32_t*>(wte.data) +
                     (id / kTileColumns * words * kTileColumns) + id % kTileColumns;
  auto* to = static_cast<uint32_t*>(row);
  for (int64_t i = 0; i < words; ++i) to[i] = from[i * kTileColumns];
}

// scale * integers of row `id`.
void read_quantized(const Weight& wte, int64_t id, float* row) {
  const int64_t tile = id / kTileColumns, lane = id % kTileColumns;
  const int64_t inputs = padded_to(wte.in_features, kQuantPad);
  const bool nibbles = wte.layout == WeightLayout::packed_nibbles;
  const uint8_t* data = static_cast<const uint8_t*>(wte.data) + tile * inputs * (nibbles ? 8 : 16);
  const uint8_t* group = nibbles ? wte.group + tile * (inputs / kNibbleGroup * 16) + lane : nullptr;
  const float scale = wte.scale[id];
  for (int64_t k = 0; k < wte.in_features; ++k) {
    int integer;
    if (nibbles) {
      const uint8_t byte = data[k / 8 * 64 + lane * 4 + k % 4];
      const int fit = group[k / kNibbleGroup * 16];
      integer = (fit & 15) * ((k % 8 < 4 ? byte & 15 : byte >> 4) - (fit >> 4));
      integer = static_cast<uint8_t>(integer + 128) - 128;  // as the dense layers unpack it
    } else {
      integer = data[k / 4 * 64 + lane * 4 + k % 4] - 128;
    }
    row[k] = scale * static_cast<float>(integer);
  }
}

}  // namespace

void embed(ExecContext& ctx, const RaggedBatch& batch, const Weight& wte, const void* wpe,
           DType dtype, float* x) {
  const int64_t channels = wte.in_features;
  const int64_t row_bytes = channels * static_cast<int64_t>(size_of(dtype));
  const int64_t wte_row_bytes = channels * static_cast<int64_t>(size_of(wte.dtype));
  ArenaScope scope(ctx.arena);
  const int64_t row_floats = padded_to(channels, 16);
  float* rows = ctx.arena.take<float>(row_floats * ctx.pool.num_threads());
  const int64_t num_items = (batch.num_tokens + kItemRows - 1) / kItemRows;
  ctx.pool.parallel_for(num_items, [&](int64_t item, int worker) {
    const int64_t end = std::min<int64_t>(batch.num_tokens, (item + 1) * kItemRows);
    for (int64_t t = item * kItemRows; t < end; ++t) {
      const int64_t id = batch.token_ids[t];
      float* row = rows + worker * row_floats;
      const void* token = row;
      if (wte.dtype == DType::i8) {
        read_quantized(wte, id, row);
      } else if (wte.layout == WeightLayout::packed) {
        read_packed(wte, id, row);
      } else {
        token = static_cast<const char*>(wte.data) + id * wte_row_bytes;
        if (wte.dtype != dtype) {
          ctx.kernels.convert(token, wte.dtype, row, dtype, channels);
          token = row;
        }
      }
      ctx.kernels.add_rows(token, static_cast<const char*>(wpe) + batch.positions[t] * row_bytes,
                           dtype, channels, x + t * channels);
    }
  });
}

}  // namespace pyengine::ops

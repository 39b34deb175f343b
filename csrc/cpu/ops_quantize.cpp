// quantize, row_rms, and embed from a quantised table, of ops.h.
#include <algorithm>
#include <atomic>

#include "cpu/dense_items.h"

namespace pyengine::ops {
namespace {

constexpr int64_t kItemTiles = 4;  // 64 columns: whole cache lines of (K, N) weights of any dtype
constexpr int64_t kItemRows = 16;

// scale * integers of token `id` + position, (C,).
void embed_row(const Weight& wte, int64_t id, const float* position, float* x) {
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
    x[k] = scale * static_cast<float>(integer) + position[k];
  }
}

}  // namespace

void embed(ExecContext& ctx, const RaggedBatch& batch, const Weight& wte, const float* wpe,
           float* x) {
  const int64_t channels = wte.in_features;
  ctx.pool.parallel_for((batch.num_tokens + kItemRows - 1) / kItemRows, [&](int64_t item, int) {
    const int64_t end = std::min<int64_t>(batch.num_tokens, (item + 1) * kItemRows);
    for (int64_t t = item * kItemRows; t < end; ++t) {
      embed_row(wte, batch.token_ids[t], wpe + batch.positions[t] * channels, x + t * channels);
    }
  });
}

bool quantize(ExecContext& ctx, const Weight& w, const float* factor, const Quantized& out) {
  cpu::QuantizeJob job;
  job.w = w.data;
  job.dtype = w.dtype;
  job.is_in_out = w.layout == WeightLayout::in_out;
  job.in_features = w.in_features;
  job.out_features = w.out_features;
  job.factor = factor;
  job.data = out.data;
  job.group = out.group;
  job.scale = out.scale;
  const int64_t tiles = (w.out_features + kTileColumns - 1) / kTileColumns;
  const int64_t strip = kItemTiles * kTileColumns * padded_to(w.in_features, kQuantPad);
  ArenaScope scope(ctx.arena);
  float* strips = ctx.arena.take<float>(strip * ctx.pool.num_threads());
  std::atomic<bool> finite{true};
  ctx.pool.parallel_for((tiles + kItemTiles - 1) / kItemTiles, [&](int64_t item, int worker) {
    const int64_t tile = item * kItemTiles;
    if (!ctx.kernels.quantize(job, tile, std::min(kItemTiles, tiles - tile),
                              strips + worker * strip)) {
      finite = false;
    }
  });
  return finite;
}

void row_rms(ExecContext& ctx, const Weight& w, float* rms) {
  ctx.pool.parallel_for((w.in_features + kItemRows - 1) / kItemRows, [&](int64_t item, int) {
    for (int64_t k = item * kItemRows; k < std::min(w.in_features, (item + 1) * kItemRows); ++k) {
      rms[k] = ctx.kernels.row_rms(w.data, w.dtype, k, w.out_features);
    }
  });
}

}  // namespace pyengine::ops

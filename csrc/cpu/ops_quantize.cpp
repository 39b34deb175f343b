// quantize and row_rms of ops.h.
#include <algorithm>
#include <atomic>

#include "cpu/dense_items.h"

namespace pyengine::ops {
namespace {

constexpr int64_t kItemTiles = 4;  // 64 columns: whole cache lines of (K, N) weights of any dtype
constexpr int64_t kItemRows = 16;

}  // namespace

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

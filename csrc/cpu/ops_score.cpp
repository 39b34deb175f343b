// score_rows of ops.h: the head tile by tile, each tile's logits reduced while they are in a cache.
//
// A row's log-sum-exp is combined from its tiles in rising order after the loop, so it does not
// depend on who computed which tile. The best tokens are kept per worker: (logit, id) has one total
// order, so merging them gives the same list however the tiles were shared out.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dense_items.h"

namespace pyengine::ops {
namespace {

constexpr int64_t kScoreItemRows = 256;  // 384 KB of logits per worker
constexpr int64_t kTile = cpu::kMaxItemColumns;

// log sum exp of a row from the results of max_sum_exp of its tiles.
double combine(const float* maxima, const float* sums, int64_t tiles) {
  const double highest = *std::max_element(maxima, maxima + tiles);
  double total = 0.0;
  for (int64_t i = 0; i < tiles; ++i) total += sums[i] * std::exp(maxima[i] - highest);
  return highest + std::log(total);
}

// The n best (logit, id), best first.
struct TopList {
  float* logits;
  int32_t* ids;
  int32_t* count;
  int32_t n;

  float threshold() const {
    return *count < n ? -std::numeric_limits<float>::infinity() : logits[n - 1];
  }
  void insert(float logit, int32_t id) {
    if (*count == n && !better(logit, id, logits[n - 1], ids[n - 1])) return;
    int32_t i = *count < n ? (*count)++ : n - 1;
    for (; i > 0 && better(logit, id, logits[i - 1], ids[i - 1]); --i) {
      logits[i] = logits[i - 1];
      ids[i] = ids[i - 1];
    }
    logits[i] = logit;
    ids[i] = id;
  }
};

}  // namespace

void score_rows(ExecContext& ctx, const void* x, int64_t num_rows, const Weight& head,
                const int32_t* targets, int32_t top_n, float* logprobs, int32_t* top_ids,
                float* top_logprobs) {
  if (num_rows == 0) return;
  ArenaScope scope(ctx.arena);
  const int threads = ctx.pool.num_threads();
  const cpu::DenseKernels& kernels = cpu::dense_kernels(ctx.kernels, head);
  const cpu::DenseJob shared = cpu::prepare_dense(ctx, x, num_rows, head, nullptr);

  const int64_t vocab = head.out_features, tiles = (vocab + kTile - 1) / kTile;
  const int64_t item_rows = std::min(num_rows, kScoreItemRows);
  const int64_t row_items = (num_rows + item_rows - 1) / item_rows;
  const int64_t scratch_size =
      (kernels.scratch_floats(head.in_features, item_rows, kTile) + 15) / 16 * 16;
  float* scratch = ctx.arena.take<float>(scratch_size * threads);
  float* logit_tiles = ctx.arena.take<float>(item_rows * kTile * threads);
  int32_t* selected = ctx.arena.take<int32_t>(kTile * threads);
  float* tile_max = ctx.arena.take<float>(num_rows * tiles);
  float* tile_sum = ctx.arena.take<float>(num_rows * tiles);
  float* target_logits = ctx.arena.take<float>(num_rows);
  const int64_t lists = num_rows * threads;
  float* list_logits = ctx.arena.take<float>(lists * top_n);
  int32_t* list_ids = ctx.arena.take<int32_t>(lists * top_n);
  int32_t* list_counts = ctx.arena.take<int32_t>(lists);
  std::fill(list_counts, list_counts + lists, 0);
  auto top_list = [&](int worker, int64_t row) {
    const int64_t i = worker * num_rows + row;
    return TopList{list_logits + i * top_n, list_ids + i * top_n, list_counts + i, top_n};
  };

  ctx.pool.parallel_for(tiles * row_items, [&](int64_t item, int worker) {
    const int64_t tile = item / row_items, col0 = tile * kTile,
                  cols = std::min(kTile, vocab - col0);
    const int64_t row0 = item % row_items * item_rows, row1 = std::min(row0 + item_rows, num_rows);
    float* logits = logit_tiles + worker * item_rows * kTile;
    cpu::DenseJob job = shared;
    job.out = logits;
    job.out_stride = kTile;
    job.out_row0 = row0;
    job.out_col0 = col0;
    kernels.run(job, row0, row1, col0, col0 + cols, scratch + worker * scratch_size);
    for (int64_t row = row0; row < row1; ++row) {
      const float* y = logits + (row - row0) * kTile;
      ctx.kernels.max_sum_exp(y, cols, &tile_max[row * tiles + tile],
                              &tile_sum[row * tiles + tile]);
      if (targets[row] >= col0 && targets[row] < col0 + cols) {
        target_logits[row] = y[targets[row] - col0];
      }
      if (top_n == 0) continue;
      TopList list = top_list(worker, row);
      int32_t* indices = selected + worker * kTile;
      const int64_t found = ctx.kernels.select_at_least(y, cols, list.threshold(), indices);
      for (int64_t i = 0; i < found; ++i) {
        list.insert(y[indices[i]], static_cast<int32_t>(col0) + indices[i]);
      }
    }
  });

  ctx.pool.parallel_for(num_rows, [&](int64_t row, int) {
    const double log_sum = combine(tile_max + row * tiles, tile_sum + row * tiles, tiles);
    logprobs[row] = static_cast<float>(target_logits[row] - log_sum);
    if (top_n == 0) return;
    TopList merged = top_list(0, row);
    for (int worker = 1; worker < threads; ++worker) {
      const TopList other = top_list(worker, row);
      for (int32_t i = 0; i < *other.count; ++i) merged.insert(other.logits[i], other.ids[i]);
    }
    for (int32_t i = 0; i < top_n; ++i) {
      const bool exists = i < *merged.count;  // a vocabulary smaller than top_n, or NaN
      top_ids[row * top_n + i] = exists ? merged.ids[i] : -1;
      top_logprobs[row * top_n + i] = exists ? static_cast<float>(merged.logits[i] - log_sum)
                                             : -std::numeric_limits<float>::infinity();
    }
  });
}

void log_sum_exp(ExecContext& ctx, const float* logits, int64_t vocab_size, const int32_t* rows,
                 int64_t num_rows, double* out) {
  ArenaScope scope(ctx.arena);
  const int64_t tiles = (vocab_size + kTile - 1) / kTile;
  float* tile_max = ctx.arena.take<float>(num_rows * tiles);
  float* tile_sum = ctx.arena.take<float>(num_rows * tiles);
  ctx.pool.parallel_for(num_rows, [&](int64_t r, int) {
    const float* x = logits + rows[r] * vocab_size;
    float* maxima = tile_max + r * tiles;
    float* sums = tile_sum + r * tiles;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t n = std::min(kTile, vocab_size - i * kTile);
      ctx.kernels.max_sum_exp(x + i * kTile, n, &maxima[i], &sums[i]);
    }
    out[r] = combine(maxima, sums, tiles);
  });
}

}  // namespace pyengine::ops

// layer_norm and convert of ops.h.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/ops.h"

namespace pyengine::ops {
namespace {

constexpr int64_t kItemRows = 16;  // a row of 768 channels takes a few hundred cycles
constexpr int64_t kItemElements = int64_t{1} << 16;

// fn(i, worker) for i in [0, n), a few at a time.
template <class F>
void for_rows(ExecContext& ctx, int64_t n, int64_t chunk, F fn) {
  ctx.pool.parallel_for((n + chunk - 1) / chunk, [&](int64_t item, int worker) {
    for (int64_t i = item * chunk; i < std::min(n, (item + 1) * chunk); ++i) fn(i, worker);
  });
}

}  // namespace

void layer_norm(ExecContext& ctx, const float* x, const int32_t* rows, int64_t num_rows,
                int64_t channels, const float* gain, const float* bias, float eps, void* out,
                DType out_dtype) {
  if (out_dtype == DType::i8) {
    ArenaScope scope(ctx.arena);
    const int64_t words = quantized_row_words(channels), padded = padded_to(channels, 16);
    float* one_row = ctx.arena.take<float>(padded * ctx.pool.num_threads());
    for_rows(ctx, num_rows, kItemRows, [&](int64_t r, int worker) {
      float* y = one_row + worker * padded;
      const int64_t row = rows != nullptr ? rows[r] : r;
      ctx.kernels.layer_norm(x + row * channels, channels, gain, bias, eps, y, false);
      ctx.kernels.dense_int8.prepare(y, 1, channels, static_cast<int32_t*>(out) + r * words);
    });
    return;
  }
  const int64_t out_bytes = channels * static_cast<int64_t>(size_of(out_dtype));
  for_rows(ctx, num_rows, kItemRows, [&](int64_t r, int) {
    const int64_t row = rows != nullptr ? rows[r] : r;
    ctx.kernels.layer_norm(x + row * channels, channels, gain, bias, eps,
                           static_cast<char*>(out) + r * out_bytes, out_dtype == DType::bf16);
  });
}

void convert(ExecContext& ctx, const void* src, DType src_dtype, void* dst, DType dst_dtype,
             int64_t n) {
  const int64_t src_bytes = static_cast<int64_t>(size_of(src_dtype));
  const int64_t dst_bytes = static_cast<int64_t>(size_of(dst_dtype));
  ctx.pool.parallel_for((n + kItemElements - 1) / kItemElements, [&](int64_t item, int) {
    const int64_t i = item * kItemElements;
    ctx.kernels.convert(static_cast<const char*>(src) + i * src_bytes, src_dtype,
                        static_cast<char*>(dst) + i * dst_bytes, dst_dtype,
                        std::min(kItemElements, n - i));
  });
}

}  // namespace pyengine::ops

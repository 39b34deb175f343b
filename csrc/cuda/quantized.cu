// Quantised matrices on their way from a file, and embeddings that are read from one. Bound by
// memory.
#include "cuda/quantized.cuh"

namespace pyengine::cuda {

namespace {

// A thread per word of the result: lane 4 g + t's columns g and g + 8 of a piece.
// Budget of arrange_integers_kernel<*>: 256 threads, 40 registers
template <bool nibbles>
__global__ void __launch_bounds__(256)
    arrange_integers_kernel(const uint32_t* src, int64_t words, uint32_t* dst) {
  start_after_previous();
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= words) return;
  const int w = static_cast<int>(at % 4), lane = static_cast<int>(at / 4 % 32);
  const int g = lane / 4, t = lane % 4;
  // The file has pieces of the same size, with a line of 16 words for the k's of a word.
  constexpr int kPieceWords = nibbles ? 128 : 256;
  const uint32_t* piece = src + at / kPieceWords * kPieceWords;
  if constexpr (!nibbles) {
    const int j = static_cast<int>(at / 128 % 2), h = w / 2;
    dst[at] = piece[(8 * j + 2 * t + w % 2) * 16 + g + 8 * h];
    return;
  }
  const int j = w / 2, h = w % 2;
  const uint32_t from = piece[(4 * j + t) * 16 + g + 8 * h];
  uint32_t to = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint32_t nibble = from >> (k < 4 ? 8 * k : 8 * (k - 4) + 4) & 15u;
    to |= nibble << (k / 2 * 4 + k % 2 * 16);
  }
  dst[at] = to;
}

// A thread per column g of a piece.
// Budget of arrange_groups_kernel: 256 threads, 40 registers
__global__ void __launch_bounds__(256)
    arrange_groups_kernel(const uint8_t* src, int64_t words, uint32_t* dst) {
  start_after_previous();
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= words) return;
  const uint8_t* piece = src + at / 8 * kGroupBytes;  // two lines of 16 columns
  const int64_t g = at % 8;
  dst[at] = piece[g] | uint32_t{piece[g + 8]} << 8 | uint32_t{piece[g + 16]} << 16 |
            uint32_t{piece[g + 24]} << 24;
}

// A block per token; a thread adds eight channels at a time.
// Budget of embed_quantized_kernel<*>: 128 threads, 64 registers; LDG STG.128
template <class T, class Integers>
__global__ void __launch_bounds__(128)
    embed_quantized_kernel(const int32_t* ids, const int32_t* positions, QuantizedMatrix wte,
                           const T* wpe, float* x) {
  start_after_previous();
  const int64_t t = blockIdx.x, channels = wte.k;
  const int64_t id = ids[t];
  const T* position = wpe + int64_t{positions[t]} * channels;
  const int64_t first = id / kPieceColumns * pieces_along_k(wte);
  const int column = static_cast<int>(id % kPieceColumns);
  const float scale = wte.scale[id];
  for (int64_t c = int64_t{threadIdx.x} * 8; c < channels; c += 128 * 8) {
    const int64_t piece = first + c / kPieceDepth;
    const int lane = column % 8 * 4 + static_cast<int>(c / 8 % 4);
    float a[8], b[8];
    const auto half =
        Integers::half(integers_at<Integers>(wte, piece), groups_at<Integers>(wte, piece), lane,
                       static_cast<int>(c / 32 % 2));
    (column < 8 ? half.column[0] : half.column[1]).floats(a);
    load8(position + c, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = scale * a[i] + b[i];
    store8(x + t * channels + c, a);
  }
}

}  // namespace

void arrange_integers(Stream& stream, const void* src, bool nibbles, int64_t k, int64_t n,
                      void* dst) {
  const int64_t words = (nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n)) / 4;
  launch("arrange_integers", stream,
         nibbles ? arrange_integers_kernel<true> : arrange_integers_kernel<false>,
         blocks_of(words, 256), 256, 0, static_cast<const uint32_t*>(src), words,
         static_cast<uint32_t*>(dst));
}

void arrange_groups(Stream& stream, const void* src, int64_t k, int64_t n, void* dst) {
  const int64_t words = ops::group_bytes(k, n) / 4;
  launch("arrange_groups", stream, arrange_groups_kernel, blocks_of(words, 256), 256, 0,
         static_cast<const uint8_t*>(src), words, static_cast<uint32_t*>(dst));
}

void embed(Stream& stream, const Tokens& tokens, const QuantizedMatrix& wte, const void* wpe,
           DType act, float* x) {
  with_type(act, [&](auto tag) {
    with_integers(wte, [&](auto integers) {
      using T = typename decltype(tag)::type;
      using Integers = typename decltype(integers)::type;
      launch("embed_quantized", stream, embed_quantized_kernel<T, Integers>, tokens.count, 128, 0,
             tokens.ids, tokens.positions, wte, static_cast<const T*>(wpe), x);
    });
  });
}

}  // namespace pyengine::cuda

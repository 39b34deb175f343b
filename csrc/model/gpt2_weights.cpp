// From the tensors of a checkpoint to the weights that the ops read.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "core/errors.h"
#include "model/gpt2.h"

namespace pyengine {

namespace {

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

int64_t elements(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

// Maps the pages of a weight that is read where it lies in a file: here, beside the tokenizer's
// loading, instead of by a fault every 64 KB in the first step. Advice: what refuses it maps the
// page on demand.
void map_pages(const void* data, size_t bytes) {
#ifdef MADV_POPULATE_READ  // Linux 5.14
  constexpr uintptr_t kPiece = uintptr_t{2}
                               << 20;  // other threads cannot map memory during a piece
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto end = reinterpret_cast<uintptr_t>(data) + bytes;
  for (auto p = reinterpret_cast<uintptr_t>(data) / page * page; p < end; p += kPiece) {
    const size_t size = end - p < kPiece ? end - p : kPiece;
    if (madvise(reinterpret_cast<void*>(p), size, MADV_POPULATE_READ) != 0) return;
  }
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

class GPT2::Loader {
 public:
  Loader(ExecContext& ctx, const std::map<std::string, TensorView>& tensors, DType dtype,
         std::vector<AlignedBuffer>& owned)
      : ctx_(ctx), tensors_(tensors), dtype_(dtype), owned_(owned) {}

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // A matrix in the model's dtype.
  const void* matrix(const std::string& name, int64_t rows, int64_t cols) {
    return as(dtype_, find_floats(name, {rows, cols}), rows * cols);
  }

  // A vector; always float32, and a copy: what lies around it in the file is given back
  // (packed_weights.h), and would return with it, as the system maps up to 2 MB at once.
  const float* vector(const std::string& name, int64_t n) {
    return static_cast<const float*>(copy(DType::f32, find_floats(name, {n}), n));
  }

  // (in, out) weights, or (out, in) ones, as they lie in the file; or what quantising made of
  // either.
  ops::Weight weight(const std::string& name, ops::WeightLayout layout, int64_t in, int64_t out) {
    if (has(name + ".scale")) return quantized(name, in, out);
    const bool in_out = layout == ops::WeightLayout::in_out;
    ops::Weight w;
    const TensorView& tensor =
        find_floats(name + ".weight", in_out ? Shape{in, out} : Shape{out, in});
    w.data = as(tensor.dtype, tensor, in * out);
    w.dtype = tensor.dtype;
    w.layout = layout;
    w.in_features = in;
    w.out_features = out;
    return w;
  }

  Dense conv1d(const std::string& name, int64_t in, int64_t out) {
    return {weight(name, ops::WeightLayout::in_out, in, out), vector(name + ".bias", out)};
  }

  Norm norm(const std::string& name, int64_t n) {
    return {vector(name + ".weight", n), vector(name + ".bias", n)};
  }

 private:
  ops::Weight quantized(const std::string& name, int64_t in, int64_t out) {
    if (dtype_ != DType::f32) {
      throw ConfigError(std::string("dtype is ") + name_of(dtype_) +
                        ", but quantised weights are computed with in float32");
    }
    const int64_t tiles = ops::padded_to(out, ops::kTileColumns) / ops::kTileColumns;
    const int64_t inputs = ops::padded_to(in, ops::kQuantPad);
    const bool nibbles = has(name + ".group");
    ops::Weight w;
    w.dtype = DType::i8;
    w.layout = nibbles ? ops::WeightLayout::packed_nibbles : ops::WeightLayout::packed;
    w.in_features = in;
    w.out_features = out;
    w.data = bytes(name + ".weight", {tiles, inputs / (nibbles ? 8 : 4), ops::kTileColumns, 4});
    w.scale = vector(name + ".scale", out);
    if (nibbles) {
      w.group = static_cast<const uint8_t*>(
          bytes(name + ".group", {tiles, inputs / ops::kNibbleGroup, ops::kTileColumns}));
    }
    return w;
  }

  const void* bytes(const std::string& name, const Shape& shape) {
    const TensorView& tensor = find(name, shape);
    if (tensor.dtype != DType::i8) {
      throw CheckpointError("tensor '" + name + "' is of " + name_of(tensor.dtype) +
                            ", but quantised weights are bytes");
    }
    map_pages(tensor.data, tensor.bytes);
    return tensor.data;
  }

  const TensorView& find(const std::string& name, const Shape& shape) const {
    auto entry = tensors_.find(name);
    if (entry == tensors_.end()) {
      throw CheckpointError("tensor '" + name + "' of shape " + text(shape) +
                            " is missing from the checkpoint");
    }
    const TensorView& tensor = entry->second;
    if (tensor.shape != shape) {
      throw CheckpointError("tensor '" + name + "' has shape " + text(tensor.shape) +
                            ", but the configuration asks for " + text(shape));
    }
    size_t expected = elements(shape) * size_of(tensor.dtype);
    if (tensor.bytes != expected) {
      throw CheckpointError("tensor '" + name + "' holds " + std::to_string(tensor.bytes) +
                            " bytes, but " + text(shape) + " of " + name_of(tensor.dtype) +
                            " takes " + std::to_string(expected));
    }
    return tensor;
  }

  const TensorView& find_floats(const std::string& name, const Shape& shape) const {
    const TensorView& tensor = find(name, shape);
    if (tensor.dtype == DType::i8) {
      throw CheckpointError("tensor '" + name + "' holds bytes where numbers are expected");
    }
    return tensor;
  }

  const void* as(DType dtype, const TensorView& tensor, int64_t n) {
    const bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % size_of(dtype) == 0;
    if (tensor.dtype != dtype || !aligned) return copy(dtype, tensor, n);
    // What will be converted (packed_weights.h) is better mapped piece by piece: it is not to be
    // in memory as a whole.
    if (dtype == dtype_) map_pages(tensor.data, tensor.bytes);
    return tensor.data;
  }

  const void* copy(DType dtype, const TensorView& tensor, int64_t n) {
    owned_.emplace_back(n * size_of(dtype));
    void* out = owned_.back().data();
    if (tensor.dtype == dtype) {
      std::memcpy(out, tensor.data, tensor.bytes);
    } else if (reinterpret_cast<uintptr_t>(tensor.data) % size_of(tensor.dtype) == 0) {
      ops::convert(ctx_, tensor.data, tensor.dtype, out, dtype, n);
    } else {
      AlignedBuffer aligned(tensor.bytes);
      std::memcpy(aligned.data(), tensor.data, tensor.bytes);
      ops::convert(ctx_, aligned.data(), tensor.dtype, out, dtype, n);
    }
    return out;
  }

  ExecContext& ctx_;
  const std::map<std::string, TensorView>& tensors_;
  DType dtype_;
  std::vector<AlignedBuffer>& owned_;
};

GPT2::GPT2(ExecContext& ctx, const GPT2Config& config,
           const std::map<std::string, TensorView>& tensors, DType dtype)
    : config_(config), dtype_(dtype), packed_(dtype) {
  config.require_valid();
  if (dtype == DType::f16) {
    throw ConfigError("dtype is float16, but the CPU computes in float32 or bfloat16");
  }
  const int64_t channels = config.n_embd;
  const int64_t inner = config.n_inner;
  Loader load(ctx, tensors, dtype, owned_);
  wte_ = load.weight("wte", ops::WeightLayout::out_in, channels, config.vocab_size);
  wpe_ = load.matrix("wpe.weight", config.n_positions, channels);
  layers_.reserve(config.n_layer);
  for (int32_t i = 0; i < config.n_layer; ++i) {
    const std::string h = "h." + std::to_string(i) + ".";
    Layer layer;
    layer.ln_1 = load.norm(h + "ln_1", channels);
    layer.c_attn = load.conv1d(h + "attn.c_attn", channels, 3 * channels);
    layer.attn_c_proj = load.conv1d(h + "attn.c_proj", channels, channels);
    layer.ln_2 = load.norm(h + "ln_2", channels);
    layer.c_fc = load.conv1d(h + "mlp.c_fc", channels, inner);
    layer.mlp_c_proj = load.conv1d(h + "mlp.c_proj", inner, channels);
    layers_.push_back(layer);
  }
  ln_f_ = load.norm("ln_f", channels);
  is_tied_ = !load.has("lm_head.weight");
  head_ = is_tied_ ? wte_
                   : load.weight("lm_head", ops::WeightLayout::out_in, channels, config.vocab_size);
  int quantized = 0, matrices = 0;
  auto count = [&](ops::Weight& weight, DType input) {
    ++matrices;
    if (weight.dtype != DType::i8) return;
    ++quantized;
    weight.input = input;
  };
  for (Layer& layer : layers_) {
    count(layer.c_attn.weight, DType::i8);
    count(layer.attn_c_proj.weight, DType::f32);  // attention's output
    count(layer.c_fc.weight, DType::i8);
    count(layer.mlp_c_proj.weight, DType::i8);
  }
  count(head_, DType::i8);
  count(wte_, DType::i8);
  if (quantized > 0) {
    if (quantized < matrices) {
      throw CheckpointError("only " + std::to_string(quantized) + " of " +
                            std::to_string(matrices) +
                            " matrices are quantised: all must be, or none");
    }
    act_ = DType::i8;
  }
  auto pack_later = [&](ops::Weight& w) {
    if (w.dtype != DType::i8) packed_.add(&w);
  };
  for (Layer& layer : layers_) {
    for (Dense* dense : {&layer.c_attn, &layer.attn_c_proj, &layer.c_fc, &layer.mlp_c_proj}) {
      pack_later(dense->weight);
    }
  }
  pack_later(head_);
  packed_.convert(ctx);
}

}  // namespace pyengine

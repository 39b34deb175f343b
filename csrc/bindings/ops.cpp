// pyengine._C.ops: NumPy in, NumPy out; bfloat16 and float16 travel as uint16.
#include "ops/ops.h"

#include <pybind11/numpy.h>

#include <cstring>
#include <optional>
#include <set>

#include "bindings/bindings.h"
#include "core/errors.h"

namespace pyengine::bindings {

namespace {

using FloatArray = AlignedFloats;
using OptionalFloats = std::optional<FloatArray>;

void require(bool ok, const std::string& what) {
  if (!ok) throw RequestError("ops: " + what);
}

// A float32 or uint16 (bfloat16) array of `ndim` dimensions.
struct Operand {
  Operand(const py::array& a, const char* name, py::ssize_t ndim) : array(a) {
    bool is_f32 = py::isinstance<py::array_t<float>>(a);
    require(is_f32 || py::isinstance<py::array_t<uint16_t>>(a),
            std::string(name) + " must be float32, or bfloat16 as uint16");
    require(a.ndim() == ndim, std::string(name) + " must have " + std::to_string(ndim) + " axes");
    require((a.flags() & py::array::c_style) != 0, std::string(name) + " must be C-contiguous");
    require(a.size() == 0 || reinterpret_cast<uintptr_t>(a.data()) % a.itemsize() == 0,
            std::string(name) + " must be aligned: copy it");
    dtype = is_f32 ? DType::f32 : DType::bf16;
  }
  const void* data() const { return array.data(); }
  int64_t shape(int axis) const { return array.shape(axis); }

  py::array array;
  DType dtype = DType::f32;
};

py::array empty(const std::vector<py::ssize_t>& shape, DType dtype) {
  if (dtype == DType::f32) return py::array_t<float>(shape);
  return py::array_t<uint16_t>(shape);
}

// Weights in the packed layout, in memory of their own.
struct PackedWeight {
  AlignedBuffer words;
  ops::Weight weight;
};

// A PackedWeight, or an array of that layout; owns or borrows what it needs.
struct WeightOperand {
  WeightOperand(const py::object& w, const std::string& layout) : object(w) {
    if (py::isinstance<PackedWeight>(w)) {
      weight = w.cast<const PackedWeight&>().weight;
      return;
    }
    require(layout == "in_out" || layout == "out_in", "layout must be in_out or out_in");
    require(py::isinstance<py::array>(w), "w must be an array or a PackedWeight");
    const Operand matrix(py::reinterpret_borrow<py::array>(w), "w", 2);
    const bool in_out = layout == "in_out";
    weight = {matrix.data(), matrix.dtype,
              in_out ? ops::WeightLayout::in_out : ops::WeightLayout::out_in,
              matrix.shape(in_out ? 0 : 1), matrix.shape(in_out ? 1 : 0)};
  }

  py::object object;
  ops::Weight weight;
};

const float* bias_from(const OptionalFloats& bias, int64_t n) {
  if (!bias) return nullptr;
  require(bias->size() == n, "bias must have " + std::to_string(n) + " elements");
  return bias->data();
}

void require_dense(const Operand& x, const ops::Weight& w) {
  require(x.dtype == w.dtype, "x and w must have one dtype");
  require(w.in_features >= 1 && w.out_features >= 1, "w must not be empty");
  require(x.shape(1) == w.in_features, "x has " + std::to_string(x.shape(1)) +
                                           " columns, but w takes " +
                                           std::to_string(w.in_features));
}

DType out_dtype_from(const std::string& name) {
  const DType dtype = dtype_from(name);
  require(dtype != DType::f16, "out_dtype must be float32 or bfloat16");
  return dtype;
}

// Runs `f` without the GIL, alone on the context.
template <class F>
void compute(PyExecContext& ctx, F&& f) {
  py::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(ctx.mutex);
  f(ctx.context);
}

KVLayerView layer_of(const PyKVCache& kv, int32_t layer) {
  require(layer >= 0 && layer < kv.cache.n_layer(), "the cache has no such layer");
  return kv.cache.layer(layer);
}

void require_batch(const Batch& batch, const PyKVCache& kv, int64_t tokens, int64_t channels) {
  const KVLayout& layout = kv.cache.layout();
  require(tokens == batch.num_tokens(), "one row per token of the batch is needed");
  require(channels == int64_t{layout.n_head} * layout.head_dim,
          "the channels must be n_head * head_dim of the cache");
  std::vector<uint8_t> marks;
  batch.require_blocks(kv.cache.num_blocks(), marks);
}

// wte (V, C), or packed from that as out_in
py::array embed(PyExecContext& ctx, const Batch& batch, const py::object& wte,
                const py::array& wpe) {
  const WeightOperand tokens(wte, "out_in");
  const ops::Weight& table = tokens.weight;
  const Operand positions(wpe, "wpe", 2);
  require(table.in_features == positions.shape(1), "wte and wpe must have one number of channels");
  require(table.layout != ops::WeightLayout::packed || table.dtype == positions.dtype,
          "packed wte must be of the dtype of wpe");
  batch.require_tokens(static_cast<int32_t>(table.out_features),
                       static_cast<int32_t>(positions.shape(0)));
  py::array x = empty({batch.num_tokens(), positions.shape(1)}, DType::f32);
  auto* out = static_cast<float*>(x.mutable_data());
  compute(ctx, [&](ExecContext& c) {
    ops::embed(c, batch.view(), table, positions.data(), positions.dtype, out);
  });
  return x;
}

py::array layer_norm(PyExecContext& ctx, const FloatArray& x, const FloatArray& gain,
                     const FloatArray& bias, float eps, const py::object& rows,
                     const std::string& out_dtype) {
  require(x.ndim() == 2, "x must have 2 axes");
  const int64_t channels = x.shape(1);
  require(gain.size() == channels && bias.size() == channels, "gain and bias must fit x");
  std::vector<int32_t> chosen;
  if (!rows.is_none()) chosen = Int32View(rows, "rows").copy();
  for (int32_t row : chosen) require(row >= 0 && row < x.shape(0), "a row does not exist");
  const int64_t num_rows = rows.is_none() ? x.shape(0) : static_cast<int64_t>(chosen.size());
  const DType dtype = out_dtype_from(out_dtype);
  py::array out = empty({num_rows, channels}, dtype);
  void* data = out.mutable_data();
  compute(ctx, [&](ExecContext& c) {
    ops::layer_norm(c, x.data(), rows.is_none() ? nullptr : chosen.data(), num_rows, channels,
                    gain.data(), bias.data(), eps, data, dtype);
  });
  return out;
}

PackedWeight pack(PyExecContext& ctx, const py::array& w, const std::string& layout,
                  const py::object& dtype) {
  const WeightOperand operand(w, layout);
  const ops::Weight& from = operand.weight;
  require(from.in_features >= 1 && from.out_features >= 1, "w must not be empty");
  const DType to = dtype.is_none() ? from.dtype : out_dtype_from(dtype.cast<std::string>());
  PackedWeight packed;
  packed.words = AlignedBuffer(ops::packed_words(to, from.in_features, from.out_features) * 4);
  packed.weight = {packed.words.data(), to, ops::WeightLayout::packed, from.in_features,
                   from.out_features};
  compute(ctx, [&](ExecContext& c) { ops::pack(c, from, to, packed.words.data()); });
  return packed;
}

py::array linear(PyExecContext& ctx, const py::array& x, const py::object& w,
                 const OptionalFloats& bias, const std::string& activation,
                 const std::string& layout, const std::string& out_dtype) {
  const Operand input(x, "x", 2);
  const WeightOperand operand(w, layout);
  const ops::Weight& weight = operand.weight;
  require_dense(input, weight);
  const float* b = bias_from(bias, weight.out_features);
  const ops::Activation act = activation_from(activation);
  const DType dtype = out_dtype_from(out_dtype);
  py::array out = empty({input.shape(0), weight.out_features}, dtype);
  void* data = out.mutable_data();
  compute(ctx, [&](ExecContext& c) {
    ops::linear(c, input.data(), input.shape(0), weight, b, act, data, dtype);
  });
  return out;
}

// x (R, K) f32 times a matrix as quantize returns it.
py::array quantized_linear(PyExecContext& ctx, const FloatArray& x, const py::array& weight,
                           const FloatArray& scale, const std::optional<py::array>& group,
                           const OptionalFloats& bias, const std::string& activation) {
  require(x.ndim() == 2 && x.shape(1) >= 1, "x must have 2 axes");
  const int64_t k = x.shape(1), n = scale.size();
  ops::Weight w;
  w.data = weight.data();
  w.dtype = DType::i8;
  w.layout = group ? ops::WeightLayout::packed_nibbles : ops::WeightLayout::packed;
  w.in_features = k;
  w.out_features = n;
  w.scale = scale.data();
  require(n >= 1 && weight.nbytes() == (group ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n)),
          "weight must have the bytes of K inputs and of N scales");
  if (group) {
    require(group->nbytes() == ops::group_bytes(k, n), "group must fit weight");
    w.group = static_cast<const uint8_t*>(group->data());
  }
  const float* b = bias_from(bias, n);
  const ops::Activation act = activation_from(activation);
  py::array out = empty({x.shape(0), n}, DType::f32);
  void* data = out.mutable_data();
  compute(ctx, [&](ExecContext& c) {
    ops::linear(c, x.data(), x.shape(0), w, b, act, data, DType::f32);
  });
  return out;
}

py::array linear_residual(PyExecContext& ctx, const py::array& x, const py::object& w,
                          const OptionalFloats& bias, const FloatArray& residual,
                          const std::string& layout) {
  const Operand input(x, "x", 2);
  const WeightOperand operand(w, layout);
  const ops::Weight& weight = operand.weight;
  require_dense(input, weight);
  require(residual.ndim() == 2 && residual.shape(0) == input.shape(0) &&
              residual.shape(1) == weight.out_features,
          "residual must be (R, N)");
  const float* b = bias_from(bias, weight.out_features);
  py::array out = empty({residual.shape(0), residual.shape(1)}, DType::f32);
  auto* data = static_cast<float*>(out.mutable_data());
  std::memcpy(data, residual.data(), residual.nbytes());
  compute(ctx, [&](ExecContext& c) {
    ops::linear_residual(c, input.data(), input.shape(0), weight, b, data);
  });
  return out;
}

py::array qkv(PyExecContext& ctx, const py::array& x, const py::object& w, const FloatArray& bias,
              const Batch& batch, PyKVCache& kv, int32_t layer, bool with_query) {
  const Operand input(x, "x", 2);
  const WeightOperand operand(w, "in_out");
  const ops::Weight& weight = operand.weight;
  require_dense(input, weight);
  require_batch(batch, kv, input.shape(0), input.shape(1));
  require(weight.out_features == 3 * input.shape(1), "w must be (C, 3C)");
  const float* b = bias_from(bias, weight.out_features);
  const KVLayerView view = layer_of(kv, layer);
  py::array q = empty({with_query ? input.shape(0) : 0, input.shape(1)}, DType::f32);
  float* data = with_query ? static_cast<float*>(q.mutable_data()) : nullptr;
  compute(ctx, [&](ExecContext& c) {
    std::lock_guard<std::mutex> lock(kv.mutex);
    ops::qkv(c, input.data(), weight, b, batch.view(), data, view);
  });
  return q;
}

py::array query(PyExecContext& ctx, const py::array& x, const py::object& w,
                const FloatArray& bias) {
  const Operand input(x, "x", 2);
  const WeightOperand operand(w, "in_out");
  const ops::Weight& weight = operand.weight;
  require_dense(input, weight);
  require(weight.out_features == 3 * input.shape(1), "w must be (C, 3C)");
  const float* b = bias_from(bias, weight.out_features);
  py::array q = empty({input.shape(0), input.shape(1)}, DType::f32);
  auto* data = static_cast<float*>(q.mutable_data());
  compute(ctx,
          [&](ExecContext& c) { ops::query(c, input.data(), input.shape(0), weight, b, data); });
  return q;
}

py::array attention(PyExecContext& ctx, const FloatArray& q, const Batch& batch, PyKVCache& kv,
                    int32_t layer, float scale, const std::string& out_dtype) {
  require(q.ndim() == 2, "q must have 2 axes");
  require_batch(batch, kv, q.shape(0), q.shape(1));
  const KVLayerView view = layer_of(kv, layer);
  const DType dtype = out_dtype_from(out_dtype);
  py::array out = empty({q.shape(0), q.shape(1)}, dtype);
  void* data = out.mutable_data();
  compute(ctx, [&](ExecContext& c) {
    std::lock_guard<std::mutex> lock(kv.mutex);
    ops::attention(c, q.data(), batch.view(), view, scale, data, dtype);
  });
  return out;
}

py::tuple score_rows(PyExecContext& ctx, const py::array& x, const py::object& head,
                     py::handle targets, int32_t top_n) {
  const Operand input(x, "x", 2);
  const WeightOperand operand(head, "out_in");
  const ops::Weight& weight = operand.weight;
  require_dense(input, weight);
  Int32View target_view(targets, "targets");
  const py::ssize_t rows = input.shape(0);
  require(target_view.size() == rows, "one target per row is needed");
  for (int32_t t : target_view) {
    require(t >= 0 && t < weight.out_features, "a target is outside the vocabulary");
  }
  require(top_n >= 0 && top_n <= 64 && top_n <= weight.out_features, "top_n must lie in 0 to 64");
  py::array_t<float> logprobs(rows), top_logprobs({rows, py::ssize_t{top_n}});
  py::array_t<int32_t> top_ids({rows, py::ssize_t{top_n}});
  float* out = logprobs.mutable_data();
  int32_t* ids_out = top_ids.mutable_data();
  float* top_out = top_logprobs.mutable_data();
  compute(ctx, [&](ExecContext& c) {
    ops::score_rows(c, input.data(), rows, weight, target_view.begin(), top_n, out, ids_out,
                    top_out);
  });
  return py::make_tuple(logprobs, top_ids, top_logprobs);
}

void copy_blocks(PyExecContext& ctx, PyKVCache& kv, int32_t layer, py::handle pairs) {
  Int32View view(pairs, "pairs");
  require(view.size() % 2 == 0, "pairs must hold sources and destinations");
  std::set<int32_t> sources, destinations;
  for (int64_t i = 0; i < view.size(); ++i) {
    const int32_t block = view.begin()[i];
    require(block >= 0 && block < kv.cache.num_blocks(), "a block does not exist");
    const bool is_new = (i % 2 == 0 ? sources : destinations).insert(block).second;
    require(is_new || i % 2 == 0, "block " + std::to_string(block) + " is copied to twice");
  }
  for (int32_t block : destinations) {
    require(sources.count(block) == 0,
            "block " + std::to_string(block) + " is copied both from and to");
  }
  const KVLayerView cache = layer_of(kv, layer);
  compute(ctx, [&](ExecContext& c) {
    std::lock_guard<std::mutex> lock(kv.mutex);
    ops::copy_blocks(c, cache, view.begin(), view.size() / 2);
  });
}

py::array convert(PyExecContext& ctx, const py::array& src, const std::string& src_dtype,
                  const std::string& dst_dtype) {
  Operand input(src, "src", src.ndim());
  const DType from = dtype_from(src_dtype), to = dtype_from(dst_dtype);
  require((from == DType::f32) == (input.dtype == DType::f32),
          "src is float32 where src_dtype says so, else uint16");
  py::array out = empty({src.shape(), src.shape() + src.ndim()}, to);
  void* data = out.mutable_data();
  const int64_t n = src.size();
  compute(ctx, [&](ExecContext& c) { ops::convert(c, input.data(), from, data, to, n); });
  return out;
}

py::array read_block(PyKVCache& kv, int32_t layer, int32_t block) {
  const KVLayerView view = layer_of(kv, layer);
  require(block >= 0 && block < view.num_blocks, "the cache has no such block");
  const size_t bytes = view.layout.block_bytes();
  py::array_t<uint8_t> out(static_cast<py::ssize_t>(bytes));
  std::lock_guard<std::mutex> lock(kv.mutex);
  std::memcpy(out.mutable_data(), static_cast<const std::byte*>(view.data) + bytes * block, bytes);
  return out;
}

void write_block(PyKVCache& kv, int32_t layer, int32_t block, const py::array_t<uint8_t>& data) {
  const KVLayerView view = layer_of(kv, layer);
  require(block >= 0 && block < view.num_blocks, "the cache has no such block");
  const size_t bytes = view.layout.block_bytes();
  require(static_cast<size_t>(data.nbytes()) == bytes,
          "a block has " + std::to_string(bytes) + " bytes");
  std::lock_guard<std::mutex> lock(kv.mutex);
  std::memcpy(static_cast<std::byte*>(view.data) + bytes * block, data.data(), bytes);
}

}  // namespace

void bind_ops(py::module_& m) {
  using py::arg;
  m.def("embed", &embed, arg("ctx"), arg("batch"), arg("wte"), arg("wpe"));
  m.def("layer_norm", &layer_norm, arg("ctx"), arg("x"), arg("gain"), arg("bias"),
        arg("eps") = 1e-5f, arg("rows") = py::none(), arg("out_dtype") = "float32");
  py::class_<PackedWeight>(m, "PackedWeight")
      .def_property_readonly("words", [](const PackedWeight& self) {
        const ops::Weight& w = self.weight;
        const int64_t words = ops::packed_column_words(w.dtype, w.in_features);
        py::array_t<uint32_t> out(
            std::vector<py::ssize_t>{(w.out_features + ops::kTileColumns - 1) / ops::kTileColumns,
                                     words, ops::kTileColumns});
        std::memcpy(out.mutable_data(), self.words.data(), out.nbytes());
        return out;
      });
  m.def("pack", &pack, arg("ctx"), arg("w"), arg("layout") = "in_out", arg("dtype") = py::none());
  m.def("linear", &linear, arg("ctx"), arg("x"), arg("w"), arg("bias") = py::none(),
        arg("activation") = "none", arg("layout") = "in_out", arg("out_dtype") = "float32");
  m.def("quantized_linear", &quantized_linear, arg("ctx"), arg("x"), arg("weight"), arg("scale"),
        arg("group") = py::none(), arg("bias") = py::none(), arg("activation") = "none");
  m.def("linear_residual", &linear_residual, arg("ctx"), arg("x"), arg("w"), arg("bias"),
        arg("residual"), arg("layout") = "in_out");
  m.def("qkv", &qkv, arg("ctx"), arg("x"), arg("w"), arg("bias"), arg("batch"), arg("kv"),
        arg("layer"), arg("with_query") = true);
  m.def("query", &query, arg("ctx"), arg("x"), arg("w"), arg("bias"));
  m.def("attention", &attention, arg("ctx"), arg("q"), arg("batch"), arg("kv"), arg("layer"),
        arg("scale"), arg("out_dtype") = "float32");
  m.def("score_rows", &score_rows, arg("ctx"), arg("x"), arg("head"), arg("targets"),
        arg("top_n") = 0);
  m.def("copy_blocks", &copy_blocks, arg("ctx"), arg("kv"), arg("layer"), arg("pairs"));
  m.def("convert", &convert, arg("ctx"), arg("src"), arg("src_dtype"), arg("dst_dtype"));
  m.def("read_block", &read_block, arg("kv"), arg("layer"), arg("block"));
  m.def("write_block", &write_block, arg("kv"), arg("layer"), arg("block"), arg("data"));
}

}  // namespace pyengine::bindings

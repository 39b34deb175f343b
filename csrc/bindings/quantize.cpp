// quantize and equalize: float tensors in, tensors of a quantised checkpoint out, as Model takes
// them.
#include "model/quantize.h"

#include <cstring>

#include "bindings/bindings.h"
#include "core/errors.h"
#include "core/file_guard.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pyengine::bindings {

namespace {

// Memory that Python owns, aligned for every instruction set.
struct PyBuffer {
  explicit PyBuffer(size_t bytes) : memory(bytes) {}
  template <class T>
  T* as() {
    return static_cast<T*>(memory.data());
  }
  AlignedBuffer memory;
};

using Shape = std::vector<int64_t>;
using Tensor = std::tuple<py::object, std::string, Shape>;

// The matrix or vector of a (buffer, dtype, shape) entry.
struct FloatTensor {
  FloatTensor(const py::handle& entry, const char* name, size_t axes)
      : FloatTensor(entry.cast<Tensor>(), name, axes) {}
  FloatTensor(const Tensor& entry, const char* name, size_t axes)
      : buffer(std::get<0>(entry), name),
        dtype(dtype_from(std::get<1>(entry))),
        shape(std::get<2>(entry)) {
    size_t bytes = size_of(dtype);
    for (int64_t size : shape) bytes *= static_cast<size_t>(size);
    if (shape.size() != axes || bytes != buffer.bytes() || bytes == 0) {
      throw RequestError(std::string(name) + " must have " + std::to_string(axes) +
                         " axes and be as large as its shape says");
    }
  }

  // The pages of a file are counted as this process's memory until they are given back; the file's
  // cache keeps them.
  void release_pages() const {
#if defined(__linux__)
    if (FileGuard::find(buffer.data()) == nullptr) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<uintptr_t>(buffer.data()) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(buffer.data()) + buffer.bytes()) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
  }

  void check_file() const {
    if (const FileGuard* file = FileGuard::find(buffer.data())) file->check();
  }

  BufferView buffer;
  DType dtype;
  Shape shape;
};

// Where a tensor lies off its element's alignment, as it may in a file, it is copied first.
struct Aligned {
  explicit Aligned(const FloatTensor& t) : data(t.buffer.data()) {
    if (reinterpret_cast<uintptr_t>(data) % size_of(t.dtype) == 0) return;
    copy = AlignedBuffer(t.buffer.bytes());
    std::memcpy(copy.data(), data, t.buffer.bytes());
    data = copy.data();
  }
  AlignedBuffer copy;
  const void* data;
};

ops::Weight weight_of(const FloatTensor& t, const Aligned& aligned, const std::string& layout) {
  const bool in_out = layout == "in_out";
  if (!in_out && layout != "out_in") throw RequestError("layout must be in_out or out_in");
  ops::Weight w;
  w.data = aligned.data;
  w.dtype = t.dtype;
  w.layout = in_out ? ops::WeightLayout::in_out : ops::WeightLayout::out_in;
  w.in_features = t.shape[in_out ? 0 : 1];
  w.out_features = t.shape[in_out ? 1 : 0];
  return w;
}

Tensor floats(std::unique_ptr<PyBuffer> buffer, int64_t n) {
  return {py::cast(std::move(buffer)), "float32", {n}};
}

py::dict quantize(PyExecContext& ctx, const py::object& weight, const std::string& layout, int bits,
                  const py::object& factor) {
  if (bits != 4 && bits != 8) throw RequestError("bits must be 4 or 8");
  const FloatTensor matrix(weight, "weight", 2);
  const Aligned aligned(matrix);
  const ops::Weight w = weight_of(matrix, aligned, layout);
  std::optional<FloatTensor> factors;
  if (!factor.is_none()) {
    factors.emplace(factor, "factor", 1);
    if (factors->dtype != DType::f32 || factors->shape[0] != w.in_features) {
      throw RequestError("factor must be float32, one for each input");
    }
  }
  const int64_t k = w.in_features, n = w.out_features;
  const bool nibbles = bits == 4;
  auto data = std::make_unique<PyBuffer>(nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n));
  auto group = std::make_unique<PyBuffer>(nibbles ? ops::group_bytes(k, n) : 0);
  auto scale = std::make_unique<PyBuffer>(n * sizeof(float));
  const ops::Quantized out = {data->as<uint8_t>(), nibbles ? group->as<uint8_t>() : nullptr,
                              scale->as<float>()};
  bool finite = false;
  {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(ctx.mutex);
    finite = ops::quantize(
        ctx.context, w, factors ? static_cast<const float*>(factors->buffer.data()) : nullptr, out);
    matrix.release_pages();
  }
  matrix.check_file();
  if (!finite) throw CheckpointError("holds NaN or infinity, which cannot be quantised");
  const int64_t tiles = (n + ops::kTileColumns - 1) / ops::kTileColumns;
  const int64_t inputs = ops::padded_to(k, ops::kQuantPad);
  py::dict tensors;
  tensors["weight"] = Tensor{py::cast(std::move(data)), "uint8",
                             Shape{tiles, inputs / (nibbles ? 8 : 4), ops::kTileColumns, 4}};
  tensors["scale"] = floats(std::move(scale), n);
  if (nibbles) {
    tensors["group"] = Tensor{py::cast(std::move(group)), "uint8",
                              Shape{tiles, inputs / ops::kNibbleGroup, ops::kTileColumns}};
  }
  return tensors;
}

py::tuple equalize_layer(PyExecContext& ctx, const py::object& weight, const py::object& gain,
                         const py::object& bias) {
  const FloatTensor matrix(weight, "weight", 2), gains(gain, "gain", 1), biases(bias, "bias", 1);
  const Aligned aligned(matrix), aligned_gain(gains), aligned_bias(biases);
  const ops::Weight w = weight_of(matrix, aligned, "in_out");
  const int64_t k = w.in_features;
  if (gains.shape[0] != k || biases.shape[0] != k) {
    throw RequestError("gain and bias must have one element for each input");
  }
  auto new_gain = std::make_unique<PyBuffer>(k * sizeof(float));
  auto new_bias = std::make_unique<PyBuffer>(k * sizeof(float));
  auto factor = std::make_unique<PyBuffer>(k * sizeof(float));
  {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(ctx.mutex);
    ops::convert(ctx.context, aligned_gain.data, gains.dtype, new_gain->as<float>(), DType::f32, k);
    ops::convert(ctx.context, aligned_bias.data, biases.dtype, new_bias->as<float>(), DType::f32,
                 k);
    equalize(ctx.context, w, new_gain->as<float>(), new_bias->as<float>(), factor->as<float>());
  }
  matrix.check_file();
  return py::make_tuple(floats(std::move(factor), k), floats(std::move(new_gain), k),
                        floats(std::move(new_bias), k));
}

Tensor to_float32(PyExecContext& ctx, const py::object& tensor) {
  auto entry = tensor.cast<Tensor>();
  const FloatTensor source(entry, "tensor", std::get<2>(entry).size());
  const Aligned aligned(source);
  const auto n = static_cast<int64_t>(source.buffer.bytes() / size_of(source.dtype));
  auto out = std::make_unique<PyBuffer>(n * sizeof(float));
  {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(ctx.mutex);
    ops::convert(ctx.context, aligned.data, source.dtype, out->as<float>(), DType::f32, n);
    source.release_pages();
  }
  source.check_file();
  return {py::cast(std::move(out)), "float32", source.shape};
}

}  // namespace

void bind_quantize(py::module_& m) {
  using py::arg;
  m.attr("QUANT_PAD") = ops::kQuantPad;
  m.attr("TILE_COLUMNS") = ops::kTileColumns;
  m.attr("NIBBLE_GROUP") = ops::kNibbleGroup;
  py::class_<PyBuffer>(m, "AlignedBuffer", py::buffer_protocol()).def_buffer([](PyBuffer& self) {
    return py::buffer_info(self.as<uint8_t>(), static_cast<py::ssize_t>(self.memory.size()));
  });
  m.def("quantize", &quantize, arg("ctx"), arg("weight"), arg("layout"), arg("bits"),
        arg("factor") = py::none());
  m.def("equalize", &equalize_layer, arg("ctx"), arg("weight"), arg("gain"), arg("bias"));
  m.def("to_float32", &to_float32, arg("ctx"), arg("tensor"));
}

}  // namespace pyengine::bindings

// A fake of cuBLASLt: it does what the descriptors say, in float64, whatever the caller meant by
// them. Dimensions, types and pointers that do not fit are errors, as with the real one.
#include "cuda/cublaslt.h"

#include <cmath>
#include <memory>
#include <vector>

#include "cuda/device.h"

namespace pyengine::cuda::lt {

namespace {

constexpr Status kInvalidValue = 7, kNotSupported = 15;

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t ld;
};
struct Desc {
  int32_t transpose_a = 0, epilogue = kEpilogueDefault;
  const void* bias = nullptr;
};
struct Wish {
  size_t workspace = 0;
};
constexpr uint64_t kMark = 0x6661'6b65;  // in algorithms, so that an invented one is found

double read(const void* data, int type, int64_t i) {
  if (type == kF16) return widen(static_cast<const f16*>(data)[i]);
  if (type == kBF16) return widen(static_cast<const bf16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

void write(void* data, int type, int64_t i, double x) {
  const auto value = static_cast<float>(x);
  if (type == kF16) {
    static_cast<f16*>(data)[i] = narrowed<f16>(value);
  } else if (type == kBF16) {
    static_cast<bf16*>(data)[i] = narrowed<bf16>(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

bool fits(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const uint64_t m = desc.transpose_a != 0 ? a.columns : a.rows;
  const uint64_t k = desc.transpose_a != 0 ? a.rows : a.columns;
  for (const Layout* l : {&a, &b, &c, &d}) {
    if (l->ld < static_cast<int64_t>(l->rows)) return false;
  }
  return b.rows == k && d.rows == m && d.columns == b.columns && c.rows == m &&
         c.columns == d.columns && a.type == b.type && c.type == d.type &&
         (d.type == kF32 || d.type == a.type);
}

Status create(Handle* handle) {
  *handle = new int(0);
  return 0;
}
Status destroy(Handle handle) {
  delete static_cast<int*>(handle);
  return 0;
}
Status desc_create(MatmulDesc* desc, int compute_type, int scale_type) {
  if (compute_type != kComputeF32 || scale_type != kF32) return kNotSupported;
  *desc = new Desc;
  return 0;
}
Status desc_destroy(MatmulDesc desc) {
  delete static_cast<Desc*>(desc);
  return 0;
}
Status desc_set(MatmulDesc handle, int attribute, const void* value, size_t bytes) {
  auto& desc = *static_cast<Desc*>(handle);
  if (attribute == kBiasPointer) {
    if (bytes != sizeof(void*)) return kInvalidValue;
    desc.bias = *static_cast<const void* const*>(value);
    return 0;
  }
  if (bytes != 4) return kInvalidValue;
  const int32_t number = *static_cast<const int32_t*>(value);
  if (attribute == kTransposeA) {
    desc.transpose_a = number;
  } else if (attribute == kEpilogue) {
    desc.epilogue = number;
  } else {
    return kNotSupported;
  }
  return 0;
}
Status layout_create(MatrixLayout* layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = new Layout{type, rows, columns, ld};
  return 0;
}
Status layout_destroy(MatrixLayout layout) {
  delete static_cast<Layout*>(layout);
  return 0;
}
Status preference_create(Preference* preference) {
  *preference = new Wish;
  return 0;
}
Status preference_destroy(Preference preference) {
  delete static_cast<Wish*>(preference);
  return 0;
}
Status preference_set(Preference preference, int attribute, const void* value, size_t bytes) {
  if (attribute != kMaxWorkspaceBytes || bytes != sizeof(size_t)) return kInvalidValue;
  static_cast<Wish*>(preference)->workspace = *static_cast<const size_t*>(value);
  return 0;
}

Status heuristic(Handle, MatmulDesc desc, MatrixLayout a, MatrixLayout b, MatrixLayout c,
                 MatrixLayout d, Preference preference, int wanted, HeuristicResult* results,
                 int* found) {
  const auto& da = *static_cast<Layout*>(a);
  if (wanted < 1 || !fits(*static_cast<Desc*>(desc), da, *static_cast<Layout*>(b),
                          *static_cast<Layout*>(c), *static_cast<Layout*>(d))) {
    return kInvalidValue;
  }
  results[0] = {
      {{kMark, da.rows, da.columns}}, static_cast<Wish*>(preference)->workspace, 0, 1, {}};
  *found = 1;
  return 0;
}

Status matmul(Handle, MatmulDesc desc_handle, const void* alpha, const void* a, MatrixLayout a_l,
              const void* b, MatrixLayout b_l, const void* beta, const void* c, MatrixLayout c_l,
              void* d, MatrixLayout d_l, const Algorithm* algorithm, void* workspace,
              size_t workspace_bytes, cudaStream_t stream) {
  const Desc desc = *static_cast<Desc*>(desc_handle);
  const Layout la = *static_cast<Layout*>(a_l), lb = *static_cast<Layout*>(b_l),
               lc = *static_cast<Layout*>(c_l), ld = *static_cast<Layout*>(d_l);
  const float scale = *static_cast<const float*>(alpha), old = *static_cast<const float*>(beta);
  const bool biased = (desc.epilogue & kEpilogueBias) != 0;
  if (!fits(desc, la, lb, lc, ld) || algorithm->data[0] != kMark || algorithm->data[1] != la.rows ||
      algorithm->data[2] != la.columns || (biased && desc.bias == nullptr) ||
      (workspace == nullptr && workspace_bytes > 0)) {
    return kInvalidValue;
  }
  sim::enqueue(stream, [=] {
    const uint64_t inner = desc.transpose_a != 0 ? la.rows : la.columns;
    for (uint64_t j = 0; j < ld.columns; ++j) {
      for (uint64_t i = 0; i < ld.rows; ++i) {
        double sum = 0;
        for (uint64_t p = 0; p < inner; ++p) {
          sum += read(a, la.type, desc.transpose_a != 0 ? i * la.ld + p : p * la.ld + i) *
                 read(b, lb.type, j * lb.ld + p);
        }
        sum *= scale;
        if (old != 0) sum += old * read(c, lc.type, j * lc.ld + i);
        if (biased) sum += read(desc.bias, ld.type, i);
        if ((desc.epilogue & kEpilogueRelu) != 0) sum = sum > 0 ? sum : 0;
        if ((desc.epilogue & kEpilogueGelu) != 0) {
          sum =
              0.5 * sum * (1 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
        }
        write(d, ld.type, j * ld.ld + i, sum);
      }
    }
  });
  return 0;
}

}  // namespace

const Api* open() {
  static const Api api = {create,         destroy,           desc_create,
                          desc_destroy,   desc_set,          layout_create,
                          layout_destroy, preference_create, preference_destroy,
                          preference_set, heuristic,         matmul};
  return sim::options().cublaslt ? &api : nullptr;
}

}  // namespace pyengine::cuda::lt

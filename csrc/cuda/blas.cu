#include <dlfcn.h>

#include <type_traits>

#include "core/errors.h"
#include "cuda/blas.h"

namespace pyengine::cuda {

#if !defined(PYENGINE_CUDA_SIM)
namespace lt {

const Api* open() {
  static Api api;
  static const bool opened = [] {
    void* library = nullptr;
    // pyengine/cuda.py has loaded PyPI's, if there is one; otherwise the system's.
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
      if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    if (library == nullptr) return false;
    bool all = true;
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      all = all && function != nullptr;
    };
    find(api.create, "cublasLtCreate");
    find(api.destroy, "cublasLtDestroy");
    find(api.desc_create, "cublasLtMatmulDescCreate");
    find(api.desc_destroy, "cublasLtMatmulDescDestroy");
    find(api.desc_set, "cublasLtMatmulDescSetAttribute");
    find(api.layout_create, "cublasLtMatrixLayoutCreate");
    find(api.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(api.preference_create, "cublasLtMatmulPreferenceCreate");
    find(api.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(api.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(api.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(api.matmul, "cublasLtMatmul");
    return all;
  }();
  return opened ? &api : nullptr;
}

}  // namespace lt
#endif

namespace {

constexpr size_t kWorkspace = size_t{32} << 20;  // what NVIDIA recommends for Hopper
constexpr size_t kMaxPlans = 4096;               // a plan per number of rows and layer

void require(lt::Status status, const char* doing) {
  if (status == 0) return;
  throw InternalError(std::string("cuBLASLt: ") + doing + ": status " + std::to_string(status));
}

int type_of(DType dtype) {
  return dtype == DType::f16 ? lt::kF16 : dtype == DType::bf16 ? lt::kBF16 : lt::kF32;
}

int32_t epilogue_of(ops::Activation activation, bool biased) {
  const int32_t bias = biased ? lt::kEpilogueBias : 0;
  if (activation == ops::Activation::gelu_tanh) return lt::kEpilogueGelu | bias;
  if (activation == ops::Activation::relu) return lt::kEpilogueRelu | bias;
  return biased ? bias : lt::kEpilogueDefault;
}

}  // namespace

// y^T = w x^T in columns: w (N, K) in rows is (K, N) in columns, transposed; x (R, K) in rows is
// (K, R) in columns; y (R, N) in rows is (N, R) in columns, so that a bias goes along its columns.
struct Blas::Plan {
  const lt::Api& api;
  lt::MatmulDesc desc = nullptr;
  lt::MatrixLayout w = nullptr, x = nullptr, y = nullptr;
  lt::HeuristicResult chosen = {};

  explicit Plan(const lt::Api& api) : api(api) {}
  ~Plan() {
    if (desc != nullptr) api.desc_destroy(desc);
    for (lt::MatrixLayout layout : {w, x, y}) {
      if (layout != nullptr) api.layout_destroy(layout);
    }
  }
};

std::unique_ptr<Blas> Blas::open() {
  const lt::Api* api = lt::open();
  return api != nullptr ? std::unique_ptr<Blas>(new Blas(*api)) : nullptr;
}

Blas::Blas(const lt::Api& api) : api_(api), workspace_(kWorkspace, "cuBLASLt's workspace") {
  require(api_.create(&handle_), "creating a handle");
}

Blas::~Blas() {
  plans_.clear();
  api_.destroy(handle_);
}

bool Blas::can(const DenseResult& result, DType act) {
  if (result.output == Output::qkv) return false;
  return result.activation == ops::Activation::none || result.activation == ops::Activation::relu ||
         (result.activation == ops::Activation::gelu_tanh && act != DType::f32);
}

Blas::Plan& Blas::plan(const Key& key) {
  const auto found = plans_.find(key);
  if (found != plans_.end()) return *found->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  const auto& [rows, k, n, act, output, activation, biased] = key;
  auto plan = std::make_unique<Plan>(api_);
  require(api_.desc_create(&plan->desc, lt::kComputeF32, lt::kF32), "describing a product");
  const int32_t transpose = lt::kOpTranspose, epilogue = epilogue_of(activation, biased);
  require(api_.desc_set(plan->desc, lt::kTransposeA, &transpose, sizeof transpose), "transposing");
  require(api_.desc_set(plan->desc, lt::kEpilogue, &epilogue, sizeof epilogue), "its epilogue");
  const int type = type_of(act), out = output == Output::act ? type : lt::kF32;
  require(api_.layout_create(&plan->w, type, k, n, k), "describing a weight");
  require(api_.layout_create(&plan->x, type, k, rows, k), "describing an input");
  require(api_.layout_create(&plan->y, out, n, rows, n), "describing a result");
  lt::Preference preference = nullptr;
  require(api_.preference_create(&preference), "creating a preference");
  api_.preference_set(preference, lt::kMaxWorkspaceBytes, &kWorkspace, sizeof kWorkspace);
  int count = 0;
  const lt::Status status = api_.heuristic(handle_, plan->desc, plan->w, plan->x, plan->y, plan->y,
                                           preference, 1, &plan->chosen, &count);
  api_.preference_destroy(preference);
  require(status, "choosing an algorithm");
  if (count == 0) throw InternalError("cuBLASLt has no algorithm for a dense layer");
  return *plans_.emplace(key, std::move(plan)).first->second;
}

void Blas::dense(Stream& stream, const void* x, DType act, int num_rows, const Dense& layer,
                 const DenseResult& result) {
  const bool biased = layer.bias != nullptr;
  Plan& p = plan({num_rows, layer.k, layer.n, act, result.output, result.activation, biased});
  if (biased) {  // a bias has the type of the result
    const void* bias = result.output == Output::act ? layer.bias_act : layer.bias;
    require(api_.desc_set(p.desc, lt::kBiasPointer, &bias, sizeof bias), "its bias");
  }
  const float one = 1, beta = result.output == Output::add ? 1.0f : 0.0f;
  require(api_.matmul(handle_, p.desc, &one, layer.weight, p.w, x, p.x, &beta, result.out, p.y,
                      result.out, p.y, &p.chosen.algorithm, workspace_.data(), workspace_.size(),
                      stream.get()),
          "a dense layer");
}

}  // namespace pyengine::cuda

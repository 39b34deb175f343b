// What the rest of pyengine knows of the CUDA back end: one class, made by a shared library that is
// opened on demand (model/device_gpt2.h), or by the simulator in tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "model/gpt2.h"
#include "ops/ops.h"
#include "sampling/plan.h"

namespace pyengine::cuda {

struct BackendDevice {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  size_t total_memory = 0, free_memory = 0;
};

// Weights, KV cache and activations of one model on device 0, and the forward pass. Not
// thread-safe. A call returns when its results are there.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendDevice& device() const = 0;  // as it was before anything was allocated

  // Everything up to and including the final layer norm of rows[0, num_rows), after the block
  // copies (num_copies pairs). The batch has been checked. Only queues work.
  virtual void run(const ops::RaggedBatch& batch, const int32_t* block_copies, int32_t num_copies,
                   const int32_t* rows, int32_t num_rows) = 0;

  // Tokens of the last run's first rows, as many as the plan has.
  virtual void sample(sampling::SamplingPlan& plan) = 0;

  // Logits (n, V) of rows [first, first + n) of the last run; on the host, the caller's to write to
  // until the next call.
  virtual float* logits(int32_t first, int32_t n) = 0;
};

// Tensors as GPT2's constructor takes them; they are not needed afterwards. `config` is valid.
// `act`: f32, f16 or bf16; `kv`: act or i8. Throws ConfigError where the device or the model does
// not fit, CheckpointError, OutOfMemory.
std::unique_ptr<Backend> make_backend(const GPT2Config& config,
                                      const std::map<std::string, TensorView>& tensors, DType act,
                                      DType kv, int32_t num_blocks);

// Device 0. Throws ConfigError where there is none that can be used.
BackendDevice find_device();

// Bytes of one block over all layers.
size_t block_bytes(const GPT2Config& config, DType kv);

// What the library exports as `pyengine_cuda_library`. The sizes tell a library of another build.
struct Library {
  uint32_t bytes = sizeof(Library), config_bytes = sizeof(GPT2Config),
           batch_bytes = sizeof(ops::RaggedBatch), tensor_bytes = sizeof(TensorView),
           plan_bytes = sizeof(sampling::RowPlan);
  decltype(&make_backend) make = nullptr;
  decltype(&find_device) find = nullptr;
  const char* architectures = "";  // compute capabilities that it has code for, as 75;80
};

}  // namespace pyengine::cuda

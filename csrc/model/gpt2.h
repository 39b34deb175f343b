// GPT-2: configuration, weights, and the forward pass over one ragged batch.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/memory.h"
#include "kv/kv_cache.h"
#include "model/batch.h"
#include "model/packed_weights.h"
#include "ops/ops.h"
#include "sampling/sampler.h"

namespace pyengine {

struct GPT2Config {
  int32_t n_layer = 0;
  int32_t n_head = 0;
  int32_t n_embd = 0;
  int32_t n_inner = 0;
  int32_t n_positions = 0;
  int32_t vocab_size = 0;
  ops::Activation activation = ops::Activation::gelu_tanh;
  float layer_norm_epsilon = 1e-5f;
  bool scale_attn_weights = true;
  bool scale_attn_by_inverse_layer_idx = false;

  int32_t head_dim() const { return n_embd / n_head; }
  void require_valid() const;  // throws ConfigError naming the field
};

// A tensor of a checkpoint, as it lies in the file.
struct TensorView {
  const void* data = nullptr;
  size_t bytes = 0;
  DType dtype = DType::f32;  // i8: the bytes of packed weights
  std::vector<int64_t> shape;
};

// Rows of a batch whose logits are not sampled from but asked for the probability of given tokens.
struct ScoredRows {
  const int32_t* rows = nullptr;     // (R,)
  const int32_t* targets = nullptr;  // (R,) the token that is to follow each
  int32_t num_rows = 0;
  int32_t top_n = 0;  // also the best tokens of each row
};

// Throw RequestError unless the rows are the batch's, and targets and top_n fit the vocabulary.
void require_rows(const Batch& batch, const int32_t* rows, int32_t num_rows);
void require_scored(const GPT2Config& config, const Batch& batch, const ScoredRows& scored);

// The rows of a batch that are sampled from, as GPT2::step describes them.
struct SampledRows {
  std::vector<int32_t> rows, slots, positions,
      drafts;  // (R,); drafts as Sampler::sample takes them

  void choose(const Sampler& sampler, const Batch& batch, const int32_t* request_slot,
              const int32_t* num_drafts);
};

class GPT2 {
 public:
  // `tensors`: canonical Hugging Face names without "transformer."; what the model does not use is
  // ignored. Matrices are read in place and must outlive the model; those that the first steps
  // cannot read as they are, whose dtype is not `dtype` (f32 or bf16), are packed at once, the
  // others step by step (model/packed_weights.h). Vectors are copied. A matrix "x.weight" is
  // quantised if there is an "x.scale": packed bytes, or nibbles with an "x.group"
  // (ops/types.h); `dtype` must then be f32. Throws ConfigError, CheckpointError.
  GPT2(ExecContext& ctx, const GPT2Config& config, const std::map<std::string, TensorView>& tensors,
       DType dtype);

  const GPT2Config& config() const { return config_; }
  DType dtype() const { return dtype_; }
  size_t owned_bytes() const;  // of vectors, and of converted and packed matrices
  bool is_packed() const { return packed_.done(); }  // no step packs weights any more

  GPT2(const GPT2&) = delete;  // packed_ points into the object
  GPT2& operator=(const GPT2&) = delete;

  // Runs the batch, samples the last token of each sequence with request_slot[b] >= 0, (B,), and
  // scores the given rows. The random counter of a sample is its position, context_len[b].
  // num_drafts (B,), or null: that many of the sequence's last tokens are drafts. Each of them and
  // the token before them has a row in `result`; Sampler::sample says which rows give tokens.
  void step(ExecContext& ctx, KVCache& kv, Sampler& sampler, const Batch& batch,
            const int32_t* request_slot, StepResult& result, const ScoredRows& scored = {},
            const int32_t* num_drafts = nullptr);

  // Logits (R, V) of rows[0, R) of the batch.
  void forward(ExecContext& ctx, KVCache& kv, const Batch& batch, const int32_t* rows,
               int32_t num_rows, float* logits);

 private:
  struct Dense {
    ops::Weight weight;
    const float* bias = nullptr;
  };
  struct Norm {
    const float* gain = nullptr;
    const float* bias = nullptr;
  };
  struct Layer {
    Norm ln_1, ln_2;
    Dense c_attn, attn_c_proj, c_fc, mlp_c_proj;
  };
  // A buffer of activations that is reused from step to step and only ever grows.
  struct Activations {
    AlignedBuffer buffer;
    void* reserve(size_t bytes) {
      if (buffer.size() < bytes) {
        buffer = AlignedBuffer();  // first free the old one: never both at once
        buffer = AlignedBuffer(bytes);
      }
      return buffer.data();
    }
    float* f32(int64_t elements) { return static_cast<float*>(reserve(elements * sizeof(float))); }
  };
  class Loader;

  void require_fits(const KVCache& kv, const Batch& batch);

  // Everything up to and including the final layer norm of `rows`: (R, C) of dtype_, or null if
  // there are none.
  const void* hidden_states(ExecContext& ctx, ProfiledStep& step, KVCache& kv, const Batch& batch,
                            const int32_t* rows, int32_t num_rows);
  void mlp(ExecContext& ctx, ProfiledStep& step, const Layer& layer, const void* attn_out,
           int64_t num_rows, float* x);
  // h (R, C) of dtype_: the hidden states of the scored rows.
  void score(ExecContext& ctx, ProfiledStep& step, const void* h, const ScoredRows& scored,
             StepResult& result);

  size_t row_bytes(int64_t features) const;  // of a row that a dense layer reads

  GPT2Config config_;
  DType dtype_;           // of attention's output, and of float weights
  DType act_ = dtype_;    // of what layer norms and c_fc write: i8 for quantised weights
  ops::Weight wte_;       // of the dtype that it has in the file
  bool is_tied_ = false;  // the head is the token embedding
  const void* wpe_ = nullptr;
  std::vector<Layer> layers_;
  Norm ln_f_;
  ops::Weight head_;
  std::vector<AlignedBuffer> owned_;
  PackedWeights packed_;
  bool has_run_ = false;

  // T, R, C as in ops.h; act is act_.
  Activations x_;          // (T, C) f32: the residual stream
  Activations h_;          // (T, C) act: what a dense layer reads
  Activations q_;          // (T, C) f32
  Activations attn_;       // (T, C) of dtype_
  Activations ff_;         // (T, n_inner) act
  Activations last_x_;     // (R, C) f32: chosen rows of the last layer
  Activations last_h_;     // (R, C) act
  Activations logits_;     // (R, V) f32
  Activations block_max_;  // (R, V / kLogitBlock) f32
  SampledRows sampled_;
  std::vector<int32_t> rows_;        // the sampled rows and the scored ones
  std::vector<int32_t> top_ids_;     // (R, top_n) of scored rows
  std::vector<float> top_logprobs_;  // (R, top_n)
  ChosenRows chosen_;
  std::vector<uint8_t> block_marks_;
};

}  // namespace pyengine

// GPT-2's forward pass on the device.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "cuda/backend.h"
#include "cuda/blas.h"
#include "cuda/kernels.h"
#include "cuda/sampling.h"
#include "cuda/weights.h"

namespace pyengine::cuda {

namespace {

std::string number(int64_t n) { return std::to_string(n); }

// Rows whose logits are on the device at once, or a few more: 64 of GPT-2's are 13 MB.
constexpr int32_t kSampledRows = 64;

size_t scale_bytes(const GPT2Config& config, DType kv) {  // of the keys of one block
  return kv == DType::i8 ? size_t{kBlockTokens} * config.n_head * sizeof(float) : 0;
}

size_t key_bytes(const GPT2Config& config, DType kv) {
  return size_t{kBlockTokens} * config.n_embd * size_of(kv);
}

// 32-bit integers of a step: written on the host one after the other, uploaded together.
class StepArrays {
 public:
  void start(size_t capacity) {
    used_ = 0;
    if (host_.size() >= capacity * 4) return;
    host_ = PinnedBuffer(capacity * 4);
    device_ = DeviceBuffer(capacity * 4, "the step's arrays");
    ++generation_;
  }
  // Room for n integers, at a multiple of 16 bytes; where they will lie on the device in `device`.
  int32_t* take(size_t n, const int32_t*& device) {
    int32_t* place = static_cast<int32_t*>(host_.data()) + used_;
    device = device_.as<int32_t>() + used_;
    used_ += (n + 3) / 4 * 4;
    return place;
  }
  void upload(Stream& stream) { stream.upload(device_.data(), host_.data(), used_ * 4); }
  int generation() const { return generation_; }  // changes when the arrays move

 private:
  PinnedBuffer host_;
  DeviceBuffer device_;
  size_t used_ = 0;
  int generation_ = 0;
};

// A buffer that grows to the largest step.
class Scratch {
 public:
  void* reserve(size_t bytes, int& generation) {
    if (buffer_.size() < bytes) {
      buffer_ = DeviceBuffer();  // never both at once
      buffer_ = DeviceBuffer(bytes, "activations");
      ++generation;
    }
    return buffer_.data();
  }

 private:
  DeviceBuffer buffer_;
};

class Model final : public Backend {
 public:
  Model(const GPT2Config& config, const std::map<std::string, TensorView>& tensors, DType act,
        DType kv, int32_t num_blocks)
      : device_(find_device()), config_(config), act_(act), kv_(kv), num_blocks_(num_blocks) {
    require_fits();
    load(tensors);
    allocate_cache();
  }

  const BackendDevice& device() const override { return device_; }
  void run(const ops::RaggedBatch& batch, const int32_t* block_copies, int32_t num_copies,
           const int32_t* rows, int32_t num_rows) override;
  void sample(sampling::SamplingPlan& plan) override;
  float* logits(int32_t first, int32_t n) override;

 private:
  struct Layer {
    Norm ln_1, ln_2;
    Dense c_attn, attn_c_proj, c_fc, mlp_c_proj;
    KVLayer cache;
  };
  struct Step {
    Tokens tokens;
    AttentionPlan plan;
    const int32_t* rows = nullptr;
    int32_t num_rows = 0;
  };
  struct CapturedStep {
    int32_t tokens = 0, segments = 0;
    std::unique_ptr<Graph> graph;
  };

  void require_fits() const;
  void load(const std::map<std::string, TensorView>& tensors);
  void allocate_cache();
  Step prepare(const ops::RaggedBatch& batch, const int32_t* rows, int32_t num_rows);
  void reserve(const Step& step);
  void forward(const Step& step);
  float* reserve_logits(int32_t n);
  float* compute_logits(int32_t first, int32_t n);  // (n, V) of the last run's rows

  BackendDevice device_;
  GPT2Config config_;
  DType act_, kv_;
  int32_t num_blocks_;
  Stream stream_;
  std::unique_ptr<Blas> blas_ = Blas::open();
  std::vector<DeviceBuffer> owned_;
  Dense wte_, head_;
  const void* wpe_ = nullptr;
  Norm ln_f_;
  std::vector<Layer> layers_;

  StepArrays arrays_;
  Scratch x_buffer_, h_buffer_, qkv_buffer_, attn_buffer_, ff_buffer_, partial_buffer_,
      logits_buffer_;
  float* x_ = nullptr;    // (T, C) f32: the residual stream
  void* h_ = nullptr;     // (max(T, R), C) act: what a dense layer reads
  void* qkv_ = nullptr;   // (T, 3C) act
  void* attn_ = nullptr;  // (T, C) act
  void* ff_ = nullptr;    // (T, n_inner) act
  float* partial_ = nullptr;
  int generation_ = 0;  // changes when a buffer moves: graphs name addresses
  int captured_generation_ = 0;
  std::vector<CapturedStep> captured_;
  PinnedBuffer host_logits_;
  RowSampler sampler_;
};

void Model::require_fits() const {
  if (act_ == DType::bf16 && device_.major < 8) {
    throw ConfigError("dtype is bfloat16, but " + device_.name + " has compute capability " +
                      number(device_.major) + "." + number(device_.minor) +
                      " and no bfloat16 arithmetic; use float16 or float32");
  }
  if (kv_ != act_ && kv_ != DType::i8) {
    throw ConfigError(std::string("KV cache: the dtype is ") + name_of(kv_) +
                      ", but on CUDA it must be that of the activations, " + name_of(act_) +
                      ", or int8");
  }
  auto require_multiple = [](int32_t value, const char* what) {
    if (value % 8 != 0) {
      throw ConfigError(std::string("config: ") + what + " is " + number(value) +
                        ", but on CUDA must be a multiple of 8");
    }
  };
  require_multiple(config_.head_dim(), "n_embd / n_head");
  require_multiple(config_.n_inner, "n_inner");
  if (num_blocks_ < 1) throw ConfigError("KV cache: num_blocks must be at least 1");
}

void Model::load(const std::map<std::string, TensorView>& tensors) {
  WeightLoader load(stream_, tensors, act_, blas_ != nullptr, owned_);
  const int64_t channels = config_.n_embd, inner = config_.n_inner;
  auto norm = [&](const std::string& name) {
    return load.norm(name, channels, config_.layer_norm_epsilon);
  };
  for (int32_t i = 0; i < config_.n_layer; ++i) {
    const std::string h = "h." + number(i) + ".";
    Layer layer;
    layer.ln_1 = norm(h + "ln_1");
    layer.c_attn = load.conv1d(h + "attn.c_attn", channels, 3 * channels);
    layer.attn_c_proj = load.conv1d(h + "attn.c_proj", channels, channels);
    layer.ln_2 = norm(h + "ln_2");
    layer.c_fc = load.conv1d(h + "mlp.c_fc", channels, inner);
    layer.mlp_c_proj = load.conv1d(h + "mlp.c_proj", inner, channels);
    layers_.push_back(layer);
  }
  ln_f_ = norm("ln_f");
  wte_ = load.matrix("wte", false, channels, config_.vocab_size);
  wpe_ = load.table("wpe.weight", config_.n_positions, channels);
  const bool is_tied = !load.has("lm_head.weight");
  head_ = is_tied ? wte_ : load.matrix("lm_head", false, channels, config_.vocab_size);
}

void Model::allocate_cache() {
  const size_t keys = key_bytes(config_, kv_) * num_blocks_;
  const size_t scales = scale_bytes(config_, kv_) * num_blocks_;
  owned_.emplace_back(block_bytes(config_, kv_) * num_blocks_, "the KV cache");
  std::byte* at = owned_.back().bytes();
  for (Layer& layer : layers_) {
    KVLayer& cache = layer.cache;
    cache.dtype = kv_;
    cache.n_head = config_.n_head;
    cache.head_dim = config_.head_dim();
    cache.keys = std::exchange(at, at + keys);
    cache.values = std::exchange(at, at + keys);
    cache.key_scales = reinterpret_cast<float*>(std::exchange(at, at + scales));
    cache.value_scales = reinterpret_cast<float*>(std::exchange(at, at + scales));
  }
}

// The step's arrays lie at places that depend on T, B and R alone, so that a captured graph finds
// them again.
Model::Step Model::prepare(const ops::RaggedBatch& batch, const int32_t* rows, int32_t num_rows) {
  const int32_t tokens = batch.num_tokens, seqs = batch.num_seqs;
  const int32_t max_blocks = (config_.n_positions + kBlockTokens - 1) / kBlockTokens;
  // No more tiles than tokens; four integers for the alignment of each array.
  arrays_.start(static_cast<size_t>(tokens) * 7 + static_cast<size_t>(seqs) * max_blocks +
                num_rows + 4 * 9);
  Step step;
  step.num_rows = num_rows;
  step.tokens.count = tokens;
  step.tokens.max_blocks = max_blocks;
  std::copy_n(batch.token_ids, tokens, arrays_.take(tokens, step.tokens.ids));
  std::copy_n(batch.positions, tokens, arrays_.take(tokens, step.tokens.positions));
  int32_t* slots = arrays_.take(tokens, step.tokens.slots);
  int32_t* sequence = arrays_.take(tokens, step.tokens.sequence);
  int32_t* table = arrays_.take(static_cast<size_t>(seqs) * max_blocks, step.tokens.block_table);
  std::copy_n(rows, num_rows, arrays_.take(num_rows, step.rows));
  int32_t* single = arrays_.take(tokens, step.plan.single);
  int32_t* tiles = arrays_.take(size_t{2} * tokens, step.plan.tiles);
  int32_t longest = 1;
  for (int32_t b = 0; b < seqs; ++b) {
    const int32_t begin = batch.query_start[b], end = batch.query_start[b + 1];
    std::fill(sequence + begin, sequence + end, b);
    for (int32_t t = begin; t < end; ++t) {
      const int32_t p = batch.positions[t];
      const int32_t block = batch.block_table[int64_t{b} * batch.max_blocks + p / kBlockTokens];
      slots[t] = block * kBlockTokens + p % kBlockTokens;
    }
    const int32_t used = std::min(batch.max_blocks, max_blocks);
    std::copy_n(batch.block_table + int64_t{b} * batch.max_blocks, used,
                table + int64_t{b} * max_blocks);
    std::fill(table + int64_t{b} * max_blocks + used, table + int64_t{b + 1} * max_blocks, 0);
    if (end - begin == 1) {
      single[step.plan.num_single++] = begin;
      longest = std::max(longest, batch.context_len[b]);
      continue;
    }
    for (int32_t i = begin; i < end; i += kQueryTile) {
      int32_t* tile = tiles + size_t{2} * step.plan.num_tiles++;
      tile[0] = i;
      tile[1] = std::min(kQueryTile, end - i);
    }
  }
  // A power of two, so that few graphs are captured; segments without keys end at once.
  while (step.plan.segments * kDecodeSegment < longest) step.plan.segments *= 2;
  return step;
}

void Model::reserve(const Step& step) {
  const int64_t tokens = step.tokens.count, channels = config_.n_embd;
  const auto act = static_cast<int64_t>(size_of(act_));
  int& moved = generation_;
  x_ = static_cast<float*>(x_buffer_.reserve(tokens * channels * 4, moved));
  h_ = h_buffer_.reserve(std::max<int64_t>(tokens, step.num_rows) * channels * act, moved);
  qkv_ = qkv_buffer_.reserve(tokens * 3 * channels * act, moved);
  attn_ = attn_buffer_.reserve(tokens * channels * act, moved);
  ff_ = ff_buffer_.reserve(tokens * config_.n_inner * act, moved);
  const int64_t partial =
      partial_floats(step.plan.num_single, config_.n_head, config_.head_dim(), step.plan.segments);
  partial_ = static_cast<float*>(partial_buffer_.reserve(partial * 4, moved));
}

void Model::forward(const Step& step) {
  const Tokens& tokens = step.tokens;
  const int n = tokens.count;
  AttentionPlan plan = step.plan;
  plan.partial = partial_;
  if (wte_.weight == nullptr) {
    embed(stream_, tokens, wte_.quantized, wpe_, act_, x_);
  } else {
    embed(stream_, tokens, wte_.weight, wpe_, act_, config_.n_embd, x_);
  }
  for (int32_t i = 0; i < config_.n_layer; ++i) {
    const Layer& layer = layers_[i];
    float scale = config_.scale_attn_weights ? 1.0f / std::sqrt(float(config_.head_dim())) : 1.0f;
    if (config_.scale_attn_by_inverse_layer_idx) scale /= static_cast<float>(i + 1);
    // An int8 cache wants the largest magnitude of each row, for which all of it must be there.
    const bool writes_kv = kv_ == act_;
    DenseResult qkv;
    qkv.output = writes_kv ? Output::qkv : Output::act;
    qkv.out = qkv_;
    qkv.tokens = tokens;
    qkv.cache = layer.cache;
    dense_of_norm(stream_, blas_.get(), x_, layer.ln_1, h_, act_, n, layer.c_attn, qkv);
    if (!writes_kv) write_kv(stream_, qkv_, act_, tokens, layer.cache);
    attention(stream_, qkv_, act_, tokens, plan, layer.cache, scale, attn_);
    dense(stream_, blas_.get(), attn_, act_, n, layer.attn_c_proj, {Output::add, x_});
    dense_of_norm(stream_, blas_.get(), x_, layer.ln_2, h_, act_, n, layer.c_fc,
                  {Output::act, ff_, config_.activation});
    dense(stream_, blas_.get(), ff_, act_, n, layer.mlp_c_proj, {Output::add, x_});
  }
  if (step.num_rows > 0) {
    layer_norm(stream_, x_, step.rows, step.num_rows, config_.n_embd, ln_f_, h_, act_);
  }
}

void Model::run(const ops::RaggedBatch& batch, const int32_t* block_copies, int32_t num_copies,
                const int32_t* rows, int32_t num_rows) {
  stream_.wait();  // the arrays of the step before may still be on their way
  if (num_copies > 0) {
    const int32_t* pairs = nullptr;
    arrays_.start(size_t{2} * num_copies + 4);
    std::copy_n(block_copies, size_t{2} * num_copies, arrays_.take(size_t{2} * num_copies, pairs));
    arrays_.upload(stream_);
    const size_t keys = key_bytes(config_, kv_), scales = scale_bytes(config_, kv_);
    for (const Layer& layer : layers_) {
      copy_blocks(stream_, layer.cache.keys, keys, pairs, num_copies);
      copy_blocks(stream_, layer.cache.values, keys, pairs, num_copies);
      if (scales == 0) continue;
      copy_blocks(stream_, layer.cache.key_scales, scales, pairs, num_copies);
      copy_blocks(stream_, layer.cache.value_scales, scales, pairs, num_copies);
    }
    stream_.wait();
  }
  const Step step = prepare(batch, rows, num_rows);
  reserve(step);
  arrays_.upload(stream_);
  // Steps that only decode come again and again: their kernels are queued by one call. The number
  // of segments is the only thing in them that is not read from memory.
  const bool decodes = step.plan.num_tiles == 0 && num_rows == step.tokens.count;
  if (!decodes) return forward(step);
  const int generation = generation_ + arrays_.generation();
  if (captured_generation_ != generation) captured_.clear();
  captured_generation_ = generation;
  auto found = std::find_if(captured_.begin(), captured_.end(), [&](const CapturedStep& c) {
    return c.tokens == step.tokens.count && c.segments == step.plan.segments;
  });
  if (found == captured_.end()) {
    CapturedStep captured{step.tokens.count, step.plan.segments, nullptr};
    captured.graph = std::make_unique<Graph>(stream_, [&] { forward(step); });
    captured_.push_back(std::move(captured));
    found = captured_.end() - 1;
  }
  found->graph->run(stream_);
}

float* Model::reserve_logits(int32_t n) {
  const size_t values = static_cast<size_t>(n) * config_.vocab_size + kLogitPadding;
  int moved = 0;  // no graph knows these
  return static_cast<float*>(logits_buffer_.reserve(values * sizeof(float), moved));
}

float* Model::compute_logits(int32_t first, int32_t n) {
  float* out = reserve_logits(n);
  const auto* h = static_cast<const std::byte*>(h_) +
                  static_cast<int64_t>(first) * config_.n_embd * size_of(act_);
  dense(stream_, blas_.get(), h, act_, n, head_, {Output::f32, out});
  return out;
}

void Model::sample(sampling::SamplingPlan& plan) {
  const auto count = static_cast<int32_t>(plan.rows.size());
  std::vector<int32_t> ends;  // of pieces
  int32_t most = 0;
  for (int32_t first = 0; first < count; first = ends.back()) {
    int32_t end = std::min(first + kSampledRows, count);
    while (end < count && plan.rows[end].draft >= 0) ++end;  // follows the row before
    most = std::max(most, end - first);
    ends.push_back(end);
  }
  // Memory is not to move while the work on a piece is queued.
  reserve_logits(most);
  sampler_.start(stream_, plan, most, config_.vocab_size);
  int32_t first = 0;
  for (int32_t end : ends) {
    sampler_.run(stream_, compute_logits(first, end - first), first, end - first);
    first = end;
  }
  sampler_.finish(stream_, plan);
}

float* Model::logits(int32_t first, int32_t n) {
  const float* out = compute_logits(first, n);
  const size_t bytes = static_cast<size_t>(n) * config_.vocab_size * sizeof(float);
  if (host_logits_.size() < bytes) host_logits_ = PinnedBuffer(bytes);
  stream_.download(host_logits_.data(), out, bytes);
  stream_.wait();
  return static_cast<float*>(host_logits_.data());
}

}  // namespace

std::unique_ptr<Backend> make_backend(const GPT2Config& config,
                                      const std::map<std::string, TensorView>& tensors, DType act,
                                      DType kv, int32_t num_blocks) {
  return std::make_unique<Model>(config, tensors, act, kv, num_blocks);
}

BackendDevice find_device() {
  const DeviceInfo info = open_device();
  return {info.name, info.major, info.minor, info.total_memory, info.free_memory};
}

size_t block_bytes(const GPT2Config& config, DType kv) {
  return 2 * static_cast<size_t>(config.n_layer) *
         (key_bytes(config, kv) + scale_bytes(config, kv));
}

}  // namespace pyengine::cuda

extern "C" __attribute__((visibility("default"))) const pyengine::cuda::Library*
pyengine_cuda_library() {
  static const pyengine::cuda::Library library = [] {
    pyengine::cuda::Library l;
    l.make = &pyengine::cuda::make_backend;
    l.find = &pyengine::cuda::find_device;
    l.architectures = pyengine::cuda::kArchitectures;
    return l;
  }();
  return &library;
}

#include "model/gpt2.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/errors.h"

namespace pyengine {

namespace {

// What a step packs takes about as long as a step of one token, and a part of that of a prompt.
constexpr size_t kPackedPerStep = size_t{64} << 20, kPackedPerToken = size_t{1} << 20;

std::string number(int64_t n) { return std::to_string(n); }

// The costs that the profile reports (core/profile.h).

Cost dense_cost(const ops::Weight& w, int64_t rows, size_t in_size, size_t out_size) {
  const int64_t k = w.in_features, n = w.out_features;
  const auto weight_bytes = w.layout == ops::WeightLayout::packed_nibbles
                                ? ops::nibble_bytes(k, n) + ops::group_bytes(k, n)
                                : static_cast<int64_t>(k * n * size_of(w.dtype));
  return {weight_bytes + rows * static_cast<int64_t>(k * in_size + n * out_size), 2 * rows * k * n};
}

Cost row_cost(int64_t rows, int64_t values, size_t in_size, size_t out_size) {
  return {rows * values * static_cast<int64_t>(in_size + out_size), 0};
}

// Scores and weighted values of each query and each key that it sees; a sequence's keys and values
// are read once.
Cost attention_cost(const ops::RaggedBatch& batch, const KVLayout& layout, size_t out_size) {
  const int64_t channels = int64_t{layout.n_head} * layout.head_dim;
  int64_t pairs = 0, keys = 0;
  for (int32_t b = 0; b < batch.num_seqs; ++b) keys += batch.context_len[b];
  for (int32_t t = 0; t < batch.num_tokens; ++t) pairs += batch.positions[t] + 1;
  const int64_t scales = layout.n_head * layout.scale_bytes() / kBlockTokens;
  const int64_t kv_bytes =
      2 * keys * (channels * static_cast<int64_t>(size_of(layout.dtype)) + scales);
  return {kv_bytes + batch.num_tokens * channels * static_cast<int64_t>(sizeof(float) + out_size),
          4 * pairs * channels};
}

}  // namespace

void GPT2Config::require_valid() const {
  auto require = [](bool ok, const char* field, double value, const char* rule) {
    if (ok) return;
    std::string text = number(static_cast<int64_t>(value));
    throw ConfigError(std::string("config: ") + field + " is " + text + ", but must be " + rule);
  };
  const char* positive = "at least 1";
  require(n_layer >= 1, "n_layer", n_layer, positive);
  require(n_head >= 1, "n_head", n_head, positive);
  require(n_embd >= 1, "n_embd", n_embd, positive);
  require(n_inner >= 1, "n_inner", n_inner, positive);
  require(n_positions >= 1, "n_positions", n_positions, positive);
  require(vocab_size >= 1, "vocab_size", vocab_size, positive);
  require(n_embd % n_head == 0, "n_embd", n_embd,
          ("a multiple of n_head, " + number(n_head)).c_str());
  if (head_dim() > kMaxHeadDim) {
    throw ConfigError("config: n_embd / n_head is " + number(head_dim()) +
                      " channels per head, but must be at most " + number(kMaxHeadDim));
  }
  if (!(layer_norm_epsilon >= 0) || !std::isfinite(layer_norm_epsilon)) {
    throw ConfigError("config: layer_norm_epsilon is " + std::to_string(layer_norm_epsilon) +
                      ", but must be a number of at least 0");
  }
}

size_t GPT2::owned_bytes() const {
  size_t total = packed_.bytes();
  for (const AlignedBuffer& buffer : owned_) total += buffer.size();
  return total;
}

void GPT2::require_fits(const KVCache& kv, const Batch& batch) {
  const KVLayout& layout = kv.layout();
  if (kv.n_layer() != config_.n_layer || layout.n_head != config_.n_head ||
      layout.head_dim != config_.head_dim()) {
    throw ConfigError("the KV cache was made for " + number(kv.n_layer()) + " layers of " +
                      number(layout.n_head) + " heads of " + number(layout.head_dim) +
                      " channels, but the model has " + number(config_.n_layer) + ", " +
                      number(config_.n_head) + " and " + number(config_.head_dim()));
  }
  batch.require_tokens(config_.vocab_size, config_.n_positions);
  batch.require_blocks(kv.num_blocks(), block_marks_);
}

void require_rows(const Batch& batch, const int32_t* rows, int32_t num_rows) {
  for (int32_t r = 0; r < num_rows; ++r) {
    if (rows[r] < 0 || rows[r] >= batch.num_tokens()) {
      throw RequestError("row " + number(rows[r]) + " does not exist: the batch has " +
                         number(batch.num_tokens()) + " tokens");
    }
  }
}

size_t GPT2::row_bytes(int64_t features) const {
  return act_ == DType::i8 ? ops::quantized_row_words(features) * sizeof(int32_t)
                           : features * size_of(act_);
}

// x += attn_out c_proj;  x += gelu(ln_2(x) c_fc) c_proj
void GPT2::mlp(ExecContext& ctx, ProfiledStep& step, const Layer& layer, const void* attn_out,
               int64_t num_rows, float* x) {
  const int64_t channels = config_.n_embd;
  const size_t act = size_of(act_), out = size_of(dtype_);
  const size_t updated = 2 * sizeof(float);  // bytes of a residual, read and written
  void* h = h_.buffer.data();
  void* ff = ff_.buffer.data();
  step.enter(Part::attn_proj, dense_cost(layer.attn_c_proj.weight, num_rows, out, updated));
  ops::linear_residual(ctx, attn_out, num_rows, layer.attn_c_proj.weight, layer.attn_c_proj.bias,
                       x);
  step.enter(Part::layer_norm, row_cost(num_rows, channels, sizeof(float), act));
  ops::layer_norm(ctx, x, nullptr, num_rows, channels, layer.ln_2.gain, layer.ln_2.bias,
                  config_.layer_norm_epsilon, h, act_);
  step.enter(Part::mlp_fc, dense_cost(layer.c_fc.weight, num_rows, act, act));
  ops::linear(ctx, h, num_rows, layer.c_fc.weight, layer.c_fc.bias, config_.activation, ff, act_);
  step.enter(Part::mlp_proj, dense_cost(layer.mlp_c_proj.weight, num_rows, act, updated));
  ops::linear_residual(ctx, ff, num_rows, layer.mlp_c_proj.weight, layer.mlp_c_proj.bias, x);
}

const void* GPT2::hidden_states(ExecContext& ctx, ProfiledStep& step, KVCache& kv,
                                const Batch& batch, const int32_t* rows, int32_t num_rows) {
  const ops::RaggedBatch view = batch.view();
  const int64_t tokens = view.num_tokens;
  // The first step goes ahead at once: it may be the only one. Later ones each do a share.
  if (has_run_) packed_.advance(ctx, kPackedPerStep + tokens * kPackedPerToken);
  has_run_ = true;
  const int64_t channels = config_.n_embd;
  const size_t act = size_of(act_), attn_out = size_of(dtype_);
  const size_t act_row = row_bytes(channels);
  float* x = x_.f32(tokens * channels);
  float* q = q_.f32(tokens * channels);
  h_.reserve((num_rows > tokens ? num_rows : tokens) * act_row);
  attn_.reserve(tokens * channels * attn_out);
  ff_.reserve(tokens * row_bytes(config_.n_inner));
  void* h = h_.buffer.data();
  void* attn = attn_.buffer.data();
  chosen_.choose(view, rows, num_rows);

  if (batch.num_copies() > 0) {
    step.enter(Part::copy_blocks, row_cost(batch.num_copies(), config_.n_layer,
                                           kv.layout().block_bytes(), kv.layout().block_bytes()));
    for (int32_t i = 0; i < config_.n_layer; ++i) {
      ops::copy_blocks(ctx, kv.layer(i), batch.block_copies(), batch.num_copies());
    }
  }
  const Cost attention = step.on() ? attention_cost(view, kv.layout(), attn_out) : Cost{};
  step.enter(Part::embed, row_cost(tokens, channels, 2 * act, sizeof(float)));
  // A tied head is packed in time, and the file not read any more.
  ops::embed(ctx, view, is_tied_ ? head_ : wte_, wpe_, dtype_, x);
  for (int32_t i = 0; i < config_.n_layer; ++i) {
    const Layer& layer = layers_[i];
    float scale = config_.scale_attn_weights ? 1.0f / std::sqrt(float(config_.head_dim())) : 1.0f;
    if (config_.scale_attn_by_inverse_layer_idx) scale /= static_cast<float>(i + 1);
    step.enter(Part::layer_norm, row_cost(tokens, channels, sizeof(float), act));
    ops::layer_norm(ctx, x, nullptr, tokens, channels, layer.ln_1.gain, layer.ln_1.bias,
                    config_.layer_norm_epsilon, h, act_);
    // Nobody reads the other rows of the last layer, which in a prompt are nearly all of them.
    const bool some_rows = i + 1 == config_.n_layer && chosen_.size() < tokens;
    // A third of the outputs is the query, float32; the rest goes to the cache.
    Cost qkv = dense_cost(layer.c_attn.weight, tokens, act,
                          (sizeof(float) + 2 * size_of(kv.layout().dtype)) / 3);
    if (some_rows) qkv.operations = qkv.operations / 3 * 2;
    step.enter(Part::qkv, qkv);
    ops::qkv(ctx, h, layer.c_attn.weight, layer.c_attn.bias, view, some_rows ? nullptr : q,
             kv.layer(i));
    if (!some_rows) {
      step.enter(Part::attention, attention);
      ops::attention(ctx, q, view, kv.layer(i), scale, attn, dtype_);
      mlp(ctx, step, layer, attn, tokens, x);
      continue;
    }
    if (num_rows == 0) return nullptr;
    const int64_t some = chosen_.size();
    step.enter(Part::gather, row_cost(some, channels, sizeof(float) + act, sizeof(float) + act));
    float* last_x = last_x_.f32(some * channels);
    auto* last_h = static_cast<std::byte*>(last_h_.reserve(some * act_row));
    for (int64_t r = 0; r < some; ++r) {
      const int64_t row = chosen_.rows()[r];
      std::memcpy(last_x + r * channels, x + row * channels, channels * sizeof(float));
      std::memcpy(last_h + r * act_row, static_cast<std::byte*>(h) + row * act_row, act_row);
    }
    const ops::RaggedBatch some_view = chosen_.view(view);
    Cost query = row_cost(some, channels, act, sizeof(float));  // its weights are counted above
    query.operations = 2 * some * channels * channels;
    step.enter(Part::qkv, query);
    ops::query(ctx, last_h, some, layer.c_attn.weight, layer.c_attn.bias, q);
    step.enter(Part::attention,
               step.on() ? attention_cost(some_view, kv.layout(), attn_out) : Cost{});
    ops::attention(ctx, q, some_view, kv.layer(i), scale, attn, dtype_);
    mlp(ctx, step, layer, attn, some, last_x);
    x = last_x;
    rows = chosen_.index();
  }
  step.enter(Part::layer_norm, row_cost(num_rows, channels, sizeof(float), act));
  ops::layer_norm(ctx, x, rows, num_rows, channels, ln_f_.gain, ln_f_.bias,
                  config_.layer_norm_epsilon, h, act_);
  return h;
}

void SampledRows::choose(const Sampler& sampler, const Batch& batch, const int32_t* request_slot,
                         const int32_t* num_drafts) {
  rows.clear();
  slots.clear();
  positions.clear();
  drafts.clear();
  const ops::RaggedBatch view = batch.view();
  for (int32_t b = 0; b < batch.num_seqs(); ++b) {
    if (request_slot[b] < 0) continue;
    sampler.require_slot(request_slot[b]);
    const int32_t guesses = num_drafts == nullptr ? 0 : num_drafts[b];
    const int32_t last = batch.last_row(b);
    if (guesses < 0 || guesses > last - view.query_start[b]) {
      throw RequestError("sequence " + number(b) + " has " +
                         number(last + 1 - view.query_start[b]) + " tokens, of which " +
                         number(guesses) + " cannot be drafts");
    }
    for (int32_t row = last - guesses; row <= last; ++row) {
      rows.push_back(row);
      slots.push_back(request_slot[b]);
      positions.push_back(view.positions[row] + 1);
      drafts.push_back(row == last - guesses ? -1 : view.token_ids[row]);
    }
  }
}

void GPT2::step(ExecContext& ctx, KVCache& kv, Sampler& sampler, const Batch& batch,
                const int32_t* request_slot, StepResult& result, const ScoredRows& scored,
                const int32_t* num_drafts) {
  ProfiledStep step(ctx.profile);
  require_fits(kv, batch);
  require_scored(config_, batch, scored);
  sampled_.choose(sampler, batch, request_slot, num_drafts);
  rows_ = sampled_.rows;
  const auto num_sampled = static_cast<int32_t>(rows_.size());
  rows_.insert(rows_.end(), scored.rows, scored.rows + scored.num_rows);
  const auto num_rows = static_cast<int32_t>(rows_.size());
  const void* h = hidden_states(ctx, step, kv, batch, rows_.data(), num_rows);
  float *logits = nullptr, *block_max = nullptr;
  if (num_sampled > 0) {
    logits = logits_.f32(static_cast<int64_t>(num_sampled) * config_.vocab_size);
    block_max = block_max_.f32(num_sampled *
                               ((config_.vocab_size + ops::kLogitBlock - 1) / ops::kLogitBlock));
    step.enter(Part::head, dense_cost(head_, num_sampled, size_of(act_), sizeof(float)));
    ops::head(ctx, h, num_sampled, head_, logits, block_max);
  }
  step.enter(Part::sampling, row_cost(num_sampled, config_.vocab_size, sizeof(float), 0));
  sampler.sample(ctx, logits, num_sampled, config_.vocab_size, sampled_.slots.data(),
                 sampled_.positions.data(), result,
                 num_drafts == nullptr ? nullptr : sampled_.drafts.data(), block_max);
  score(ctx, step, static_cast<const std::byte*>(h) + num_sampled * row_bytes(config_.n_embd),
        scored, result);
}

void GPT2::score(ExecContext& ctx, ProfiledStep& step, const void* h, const ScoredRows& scored,
                 StepResult& result) {
  const int32_t n = scored.num_rows, top_n = scored.top_n;
  result.scores.resize(n);
  result.score_tops.assign(n, {});
  if (n == 0) return;
  step.enter(Part::score, dense_cost(head_, n, size_of(act_), 0));
  top_ids_.resize(static_cast<size_t>(n) * top_n);
  top_logprobs_.resize(top_ids_.size());
  ops::score_rows(ctx, h, n, head_, scored.targets, top_n, result.scores.data(), top_ids_.data(),
                  top_logprobs_.data());
  for (int64_t i = 0; i < static_cast<int64_t>(top_ids_.size()); ++i) {
    result.score_tops[i / top_n].emplace_back(top_ids_[i], top_logprobs_[i]);
  }
}

void require_scored(const GPT2Config& config, const Batch& batch, const ScoredRows& scored) {
  require_rows(batch, scored.rows, scored.num_rows);
  for (int32_t r = 0; r < scored.num_rows; ++r) {
    if (scored.targets[r] < 0 || scored.targets[r] >= config.vocab_size) {
      throw RequestError("target token " + number(scored.targets[r]) +
                         " is outside the vocabulary of " + number(config.vocab_size));
    }
  }
  constexpr int32_t kMaxTopN = 64;  // ops::score_rows
  if (scored.top_n < 0 || scored.top_n > kMaxTopN || scored.top_n > config.vocab_size) {
    throw RequestError("top_n is " + number(scored.top_n) + ", but must lie in 0 to " +
                       number(std::min(kMaxTopN, config.vocab_size)));
  }
}

void GPT2::forward(ExecContext& ctx, KVCache& kv, const Batch& batch, const int32_t* rows,
                   int32_t num_rows, float* logits) {
  ProfiledStep step(ctx.profile);
  require_fits(kv, batch);
  require_rows(batch, rows, num_rows);
  const void* h = hidden_states(ctx, step, kv, batch, rows, num_rows);
  if (num_rows == 0) return;
  step.enter(Part::head, dense_cost(head_, num_rows, size_of(act_), sizeof(float)));
  ops::linear(ctx, h, num_rows, head_, nullptr, ops::Activation::none, logits, DType::f32);
}

}  // namespace pyengine

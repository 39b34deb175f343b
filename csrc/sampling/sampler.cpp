#include "sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/errors.h"
#include "ops/ops.h"
#include "sampling/choice.h"
#include "sampling/philox.h"

namespace pyengine {

using sampling::Candidate;
using sampling::Row;
using sampling::TokenMask;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void require(bool ok, const char* what, double value) {
  if (!ok) throw RequestError(std::string(what) + ", not " + std::to_string(value));
}

void require_valid(const SlotParams& p) {
  auto is_share = [](double x) { return x >= 0 && x <= 1; };
  require(p.temperature >= 0 && std::isfinite(p.temperature),
          "temperature must be 0 (greedy) or a positive number", p.temperature);
  require(p.top_k >= 0, "top_k must be 0 (all tokens) or positive", p.top_k);
  require(is_share(p.top_p), "top_p must lie in [0, 1]", p.top_p);
  require(is_share(p.min_p), "min_p must lie in [0, 1]", p.min_p);
  require(is_share(p.typical_p), "typical_p must lie in [0, 1]", p.typical_p);
  require(is_share(p.epsilon_cutoff), "epsilon_cutoff must lie in [0, 1]", p.epsilon_cutoff);
  require(is_share(p.eta_cutoff), "eta_cutoff must lie in [0, 1]", p.eta_cutoff);
  require(p.mirostat_tau >= 0 && std::isfinite(p.mirostat_tau),
          "mirostat_tau must be 0 (off) or a positive number", p.mirostat_tau);
  require(p.mirostat_eta > 0 && std::isfinite(p.mirostat_eta),
          "mirostat_eta must be a positive number", p.mirostat_eta);
  require(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty),
          "repetition_penalty must be a positive number", p.repetition_penalty);
  require(std::isfinite(p.presence_penalty), "presence_penalty must be a number",
          p.presence_penalty);
  require(std::isfinite(p.frequency_penalty), "frequency_penalty must be a number",
          p.frequency_penalty);
  require(p.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must be 0 (off) or positive",
          p.no_repeat_ngram_size);
  require(p.min_tokens >= 0, "min_tokens must be 0 or positive", p.min_tokens);
  require(p.logprobs >= -1, "logprobs must be -1 (none), 0 or positive", p.logprobs);
  require(p.num_candidates >= 0, "num_candidates must be 0 (none) or positive", p.num_candidates);
  auto require_ids = [](const std::vector<int32_t>& ids, const char* field) {
    for (int32_t id : ids) {
      require(id >= 0, (std::string(field) + ": token ids must be 0 or positive").c_str(), id);
    }
  };
  require_ids(p.allowed_token_ids, "allowed_token_ids");
  require_ids(p.stop_ids, "stop_ids");
  require_ids(p.replay, "replay");
  for (const BiasedSequence& entry : p.logit_bias) {
    require(!entry.ids.empty(), "logit_bias: a sequence must have 1 token at least", 0);
    require_ids(entry.ids, "logit_bias");
    require(entry.bias < std::numeric_limits<float>::infinity(),
            "logit_bias must be a number or -infinity", entry.bias);
  }
  for (const std::vector<int32_t>& ids : p.bad_words) {
    require(!ids.empty(), "bad_words: a sequence must have 1 token at least", 0);
    require_ids(ids, "bad_words");
  }
}

// The loaded row's best tokens with their log-probabilities.
void add_top_logprobs(Row& row, std::vector<Candidate>& best, int32_t count, double log_total,
                      std::vector<std::pair<int32_t, float>>& out) {
  row.select_top_k(count, best);
  std::partial_sort(best.begin(), best.begin() + count, best.end(), sampling::better);
  for (int32_t i = 0; i < count; ++i) {
    out.emplace_back(best[i].id, static_cast<float>(best[i].logit - log_total));
  }
}

}  // namespace

Sampler::Sampler(int32_t num_slots) {
  if (num_slots < 1) {
    throw ConfigError("a sampler needs at least 1 slot, not " + std::to_string(num_slots));
  }
  slots_.resize(num_slots);
}

void Sampler::require_slot(int32_t slot) const {
  if (slot < 0 || slot >= num_slots()) {
    throw RequestError("request slot " + std::to_string(slot) +
                       " does not exist: the sampler has " + std::to_string(num_slots()));
  }
}

void Sampler::set(int32_t slot, SlotParams params, const SlotStart& start) {
  require_slot(slot);
  require_valid(params);
  Slot& s = slots_[slot];
  s.keeps_history = sampling::needs_history(params);
  if (s.keeps_history && start.num_prompt > start.num_tokens) {
    throw RequestError("the first " + std::to_string(start.num_prompt) + " of " +
                       std::to_string(start.num_tokens) + " tokens cannot be the prompt's");
  }
  s.is_edited = s.keeps_history || !params.logit_bias.empty() || !params.bad_words.empty() ||
                !params.allowed_token_ids.empty() || params.min_tokens > 0;
  s.history.reset(start.tokens, s.keeps_history ? start.num_tokens : 0, start.num_prompt);
  s.allowed = sampling::mask_of(params.allowed_token_ids);
  s.masks.clear();
  s.num_prompt = start.num_prompt;
  // The first bound of Mirostat is twice the surprise it aims at.
  s.mirostat_mu = std::isnan(start.mirostat_mu) ? 2 * params.mirostat_tau : start.mirostat_mu;
  s.last_call = 0;
  s.params = std::move(params);
}

void Sampler::set_masks(int32_t slot, const uint32_t* words, int64_t num_masks,
                        int64_t words_of_each) {
  require_slot(slot);
  require(words_of_each > 0, "a mask needs 1 word at least", static_cast<double>(words_of_each));
  std::vector<TokenMask>& masks = slots_[slot].masks;
  masks.resize(num_masks);
  for (int64_t i = 0; i < num_masks; ++i) {
    const uint32_t* begin = words + i * words_of_each;
    masks[i].assign(begin, begin + words_of_each);
  }
}

void Sampler::require_rows(const Rows& rows) {
  ++num_calls_;
  for (int64_t r = 0; r < rows.count; ++r) {
    require_slot(rows.slots[r]);
    Slot& slot = slots_[rows.slots[r]];
    if (rows.follows(r)) {
      if (r == 0 || rows.slots[r] != rows.slots[r - 1] ||
          rows.positions[r] != rows.positions[r - 1] + 1) {
        throw InternalError("row " + std::to_string(r) + " does not follow the one before it");
      }
      if (slot.params.has_processor) {
        throw InternalError("slot " + std::to_string(rows.slots[r]) +
                            " has a logits processor, and takes no drafts");
      }
      continue;
    }
    if (!slot.keeps_history) continue;
    const auto length = static_cast<int64_t>(slot.history.tokens().size());
    if (length != rows.positions[r]) {
      throw InternalError("slot " + std::to_string(rows.slots[r]) + " has seen " +
                          std::to_string(length) + " tokens, but samples position " +
                          std::to_string(rows.positions[r]));
    }
    if (std::exchange(slot.last_call, num_calls_) == num_calls_) {
      throw InternalError("slot " + std::to_string(rows.slots[r]) + " has two groups of rows");
    }
  }
}

void Sampler::start(const Rows& rows, StepResult& result) {
  result.token_ids.assign(rows.count, 0);
  result.logprobs.assign(rows.count, std::numeric_limits<float>::quiet_NaN());
  result.top_logprobs.assign(rows.count, {});
  result.mirostat_mu.clear();
  result.candidates.clear();
  group_starts_.clear();
  scored_rows_.clear();
  processed_rows_.clear();
  for (int64_t r = 0; r < rows.count; ++r) {
    const SlotParams& params = slots_[rows.slots[r]].params;
    if (!rows.follows(r)) group_starts_.push_back(r);
    if (params.is_scored()) scored_rows_.push_back(static_cast<int32_t>(r));
    if (params.has_processor) processed_rows_.push_back(static_cast<int32_t>(r));
    if (params.mirostat_tau > 0) result.mirostat_mu.resize(rows.count, kNan);
    if (params.num_candidates > 0) result.candidates.resize(rows.count);
  }
  group_starts_.push_back(rows.count);
}

void Sampler::sum_logits(ExecContext& ctx, const Rows& rows) {
  if (scored_rows_.empty()) return;
  log_totals_.resize(scored_rows_.size());
  row_log_total_.resize(rows.count);
  ops::log_sum_exp(ctx, rows.logits, rows.vocab_size, scored_rows_.data(),
                   static_cast<int64_t>(scored_rows_.size()), log_totals_.data());
  for (size_t i = 0; i < scored_rows_.size(); ++i) row_log_total_[scored_rows_[i]] = log_totals_[i];
}

void Sampler::edit(const Rows& rows, int64_t r, size_t place, Workspace& workspace) {
  Slot& slot = slots_[rows.slots[r]];
  workspace.edited.start(rows.of(r), rows.vocab_size);
  if (slot.is_edited) {
    workspace.edited.apply(slot.params, slot.allowed, slot.history,
                           rows.positions[r] - slot.num_prompt);
  }
  if (is_masked(slot, place)) {
    sampling::apply_mask(slot.masks[place], rows.of(r), rows.vocab_size);
  }
}

// 0, or what stands for the token.
int32_t Sampler::run_processor(const Rows& rows, int64_t r) {
  const std::vector<int32_t>& tokens = slots_[rows.slots[r]].history.tokens();
  const bool ok =
      processor_ && processor_(rows.slots[r], tokens.data(), static_cast<int64_t>(tokens.size()),
                               rows.of(r), rows.vocab_size);
  return ok ? 0 : StepResult::kProcessorFailed;
}

// From the row as it is to its token.
void Sampler::finish(const ExecContext& ctx, const Rows& rows, int64_t r, Workspace& workspace,
                     bool was_edited, StepResult& result) {
  Slot& slot = slots_[rows.slots[r]];
  Row& row = workspace.row;
  if (was_edited && !row.load(ctx, rows.of(r), rows.vocab_size)) {
    result.token_ids[r] = StepResult::kNoneLeft;
    return;
  }
  const double u =
      uniform(slot.params.seed, static_cast<uint32_t>(rows.positions[r]), slot.params.sample_index);
  const int32_t token = sampling::choose(row, slot.params, rows.vocab_size, u, workspace.candidates,
                                         slot.mirostat_mu);
  take(rows, r, token, result);
}

void Sampler::take(const Rows& rows, int64_t r, int32_t token, StepResult& result) {
  Slot& slot = slots_[rows.slots[r]];
  const auto replayed = static_cast<size_t>(rows.positions[r] - slot.num_prompt);
  if (replayed < slot.params.replay.size()) token = slot.params.replay[replayed];
  result.token_ids[r] = token;
  if (slot.keeps_history) slot.history.append(token);
  if (slot.params.mirostat_tau > 0) result.mirostat_mu[r] = slot.mirostat_mu;
}

template <class Original>
void Sampler::list_candidates(const ExecContext& ctx, const Rows& rows, int64_t r,
                              Workspace& workspace, Original&& original, StepResult& result) {
  const Slot& slot = slots_[rows.slots[r]];
  if (!workspace.row.load(ctx, rows.of(r), rows.vocab_size)) {
    result.token_ids[r] = StepResult::kNoneLeft;
    return;
  }
  const int32_t count = std::min(slot.params.num_candidates, rows.vocab_size);
  std::vector<Candidate>& best = workspace.candidates;
  workspace.row.select_top_k(count, best);
  std::partial_sort(best.begin(), best.begin() + count, best.end(), sampling::better);
  std::vector<BeamCandidate>& listed = result.candidates[r];
  listed.reserve(count);
  for (int32_t i = 0; i < count && !std::isinf(best[i].logit); ++i) {
    listed.push_back({best[i].id, best[i].logit, original(best[i].id)});
  }
  result.token_ids[r] = best[0].id;
}

void Sampler::sample(ExecContext& ctx, float* logits, int64_t num_rows, int32_t vocab_size,
                     const int32_t* slots, const int32_t* positions, StepResult& result,
                     const int32_t* drafts, const float* block_max) {
  const Rows rows{logits, num_rows, vocab_size, slots, positions, drafts, block_max};
  require_rows(rows);
  start(rows, result);
  sum_logits(ctx, rows);
  if (workspaces_.size() < static_cast<size_t>(ctx.pool.num_threads())) {
    workspaces_.resize(ctx.pool.num_threads());
  }
  if (processed_originals_.size() < processed_rows_.size()) {
    processed_originals_.resize(processed_rows_.size());
  }
  ctx.pool.parallel_for(static_cast<int64_t>(group_starts_.size()) - 1, [&](int64_t i, int worker) {
    const int64_t first = group_starts_[i];
    sample_group(rows, first, group_starts_[i + 1], result, [&](int64_t r) {
      sample_row(ctx, rows, r, static_cast<size_t>(r - first), workspaces_[worker], result);
    });
  });
  if (!processed_rows_.empty()) {
    for (int32_t r : processed_rows_) {
      if (result.token_ids[r] == 0) result.token_ids[r] = run_processor(rows, r);
    }
    ctx.pool.parallel_for(static_cast<int64_t>(processed_rows_.size()), [&](int64_t i, int worker) {
      const int32_t r = processed_rows_[i];
      if (result.token_ids[r] < 0) return;
      const std::vector<float>& originals = processed_originals_[i];
      const SlotParams& params = slots_[slots[r]].params;
      if (params.num_candidates > 0) {
        list_candidates(
            ctx, rows, r, workspaces_[worker], [&](int32_t id) { return originals[id]; }, result);
        return;
      }
      finish(ctx, rows, r, workspaces_[worker], true, result);
      const int32_t token = result.token_ids[r];
      if (token >= 0 && params.logprobs >= 0) result.logprobs[r] = logprob(r, originals[token]);
    });
  }
  for (int64_t r = 0; r < num_rows; ++r) slots_[slots[r]].masks.clear();
}

void Sampler::sample_row(const ExecContext& ctx, const Rows& rows, int64_t r, size_t place,
                         Workspace& workspace, StepResult& result) {
  const Slot& slot = slots_[rows.slots[r]];
  const int32_t vocab_size = rows.vocab_size;
  if (!workspace.row.load(ctx, rows.of(r), vocab_size, rows.block_max_of(r))) {
    result.token_ids[r] = StepResult::kNotFinite;
    return;
  }
  const bool scored = slot.params.is_scored();
  const bool listed = slot.params.num_candidates > 0;
  if (slot.params.logprobs > 0) {
    add_top_logprobs(workspace.row, workspace.candidates,
                     std::min(slot.params.logprobs, vocab_size), row_log_total_[r],
                     result.top_logprobs[r]);
  }
  if (listed) {
    float* x = rows.of(r);
    for (int32_t i = 0; i < vocab_size; ++i) x[i] = logprob(r, x[i]);
  }
  if (slot.params.has_processor) {
    const auto of_row = std::lower_bound(processed_rows_.begin(), processed_rows_.end(), r);
    if (scored) {
      processed_originals_[of_row - processed_rows_.begin()].assign(rows.of(r),
                                                                    rows.of(r) + vocab_size);
    }
    edit(rows, r, place, workspace);
    return;  // to be continued after the processor
  }
  const bool edits = slot.is_edited || is_masked(slot, place);
  if (listed || edits) edit(rows, r, place, workspace);
  if (listed) {
    const sampling::EditedRow& edited = workspace.edited;
    list_candidates(
        ctx, rows, r, workspace, [&](int32_t id) { return edited.original(id); }, result);
    return;
  }
  finish(ctx, rows, r, workspace, edits, result);
  const int32_t token = result.token_ids[r];
  if (scored && token >= 0) {
    result.logprobs[r] = logprob(r, edits ? workspace.edited.original(token) : rows.of(r)[token]);
  }
}

void Sampler::process(ExecContext& ctx, float* logits, int64_t num_rows, int32_t vocab_size,
                      const int32_t* slots, const int32_t* positions) {
  const Rows rows{logits, num_rows, vocab_size, slots, positions, nullptr, nullptr};
  require_rows(rows);
  if (workspaces_.size() < static_cast<size_t>(ctx.pool.num_threads())) {
    workspaces_.resize(ctx.pool.num_threads());
  }
  constexpr float kCutOff = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < num_rows; ++r) {
    const Slot& slot = slots_[slots[r]];
    Workspace& workspace = workspaces_[0];
    float* x = rows.of(r);
    edit(rows, r, 0, workspace);
    if (slot.params.has_processor && run_processor(rows, r) != 0) {
      throw RequestError("the logits processor of slot " + std::to_string(slots[r]) + " failed");
    }
    if (!workspace.row.load(ctx, x, vocab_size) || slot.params.temperature == 0.0f) continue;
    const float scale = sampling::inverse_temperature(slot.params.temperature);
    double total = 0;
    const sampling::Kept kept = sampling::cut_off(workspace.row, slot.params, slot.mirostat_mu,
                                                  vocab_size, workspace.candidates, total);
    if (kept != sampling::Kept::candidates) {
      const bool all = kept == sampling::Kept::all;
      for (int32_t i = 0; i < vocab_size; ++i) {
        x[i] = all || workspace.row.weight(i) > 0 ? x[i] * scale : kCutOff;
      }
      continue;
    }
    std::fill_n(x, vocab_size, kCutOff);
    for (const Candidate& c : workspace.candidates) x[c.id] = c.logit * scale;
  }
}

}  // namespace pyengine

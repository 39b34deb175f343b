// From a row of edited logits to its token: cut-offs and the draw.
//
// Nothing is sorted: a threshold (the k-th best token, the last one of a nucleus) is found by
// selection through a histogram, of tokens or of their weights. Weights are added as integers, in
// units of 2^-44 of the best token's: the sums are the same in any order, and so are the tokens,
// whatever the number of threads. On the CPU weights have the same bits, and are added as
// floating-point numbers; a token can differ where a random number or a threshold comes nearer than
// 1e-7 to a sum of probabilities.
#include <algorithm>

#include "cuda/sampling.cuh"
#include "ops/types.h"
#include "sampling/definitions.h"
#include "sampling/philox.h"

namespace pyengine::cuda {

namespace {

using sampling::kForbidden;
using sampling::ListedToken;
using sampling::RowOutcome;
using sampling::RowPlan;

constexpr int kThreads = 512;
constexpr int kBins = 2048;
constexpr int kEdge = 256;  // tokens of a bin that are compared one by one

// Weights and numbers of tokens in integers.
constexpr float kUnits = 0x1p44f;
__device__ inline uint64_t units_of(float weight) {
  return static_cast<uint64_t>(weight * kUnits);  // of 2^19 tokens' weights: below 2^63
}
__device__ inline double weight_of_units(uint64_t units) {
  return static_cast<double>(units) * 0x1p-44;
}

// Floats in the order of unsigned integers.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

struct Workspace {
  uint32_t low[kBins], high[kBins];  // the two words of a bin's measure
  float edge_key[kEdge];
  int32_t edge_id[kEdge];
  uint64_t edge_measure[kEdge];
  uint64_t warps[32];
  float maxima[32];
  double number;
  uint64_t before;
  int32_t edge_bin, num_edge;
  uint32_t edge_min, edge_max;
  float found_key;
  int32_t found_id;
};

// f() of one thread, for all.
template <class F>
__device__ inline double once(Workspace& w, F&& f) {
  if (threadIdx.x == 0) w.number = f();
  __syncthreads();
  const double result = w.number;
  __syncthreads();
  return result;
}

// The sum over the threads before this one.
__device__ inline uint64_t sum_before(uint64_t x, uint64_t* warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint64_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  uint64_t before = sum - x;
  for (int i = 0; i < warp; ++i) before += warps[i];
  __syncthreads();
  return before;
}

struct Logits {
  const float* x;
  int vocab_size;

  // The row in groups of four logits, each at a multiple of 16 bytes: the first and the last one
  // may begin before the row, and end after it.
  __device__ int groups() const { return (shift_of(x) + vocab_size + 3) / 4; }
  __device__ float4 group(int g) const {
    return *reinterpret_cast<const float4*>(x + (4 * g - shift_of(x)));
  }
  // f(id, logit) of a group's logits.
  template <class F>
  __device__ void visit(int g, float4 four, F&& f) const {
    const int id = 4 * g - shift_of(x);
    const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (id + i >= 0 && id + i < vocab_size) f(id + i, v[i]);
    }
  }
  // f(id, logit) of all, by a block. The next groups are on their way while f sees one.
  template <class F>
  __device__ void for_each(F&& f) const {
    constexpr int kAhead = 2;
    const int n = groups(), step = static_cast<int>(blockDim.x);
    int g = static_cast<int>(threadIdx.x);
    float4 next[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (g + i * step < n) next[i] = group(g + i * step);
    }
    for (; g < n; g += step) {
      const float4 four = next[0];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) next[i - 1] = next[i];
      if (g + kAhead * step < n) next[kAhead - 1] = group(g + kAhead * step);
      visit(g, four, f);
    }
  }
};

// Which tokens the cut-offs have left, and what they weigh.
struct Kept {
  float max, scale, temperature;
  float floor = sampling::kLowestLogit;  // the least logit
  float tie = kForbidden;                // of the tokens with this logit those up to tie_id
  int32_t tie_id = 0;
  float least = 0;  // weight
  bool typical = false;
  double log_total = 0, entropy = 0;  // where `typical` is decided
  float farthest = 0;                 // distance

  __device__ float distance(float x) const {
    return static_cast<float>(
        sampling::typical_distance(sampling::log_weight(x, max, scale), log_total, entropy));
  }
  __device__ bool holds(int id, float x, float& weight) const {
    if (x < floor || (x == tie && id > tie_id)) return false;
    weight = sampling::weight_of(x, max, scale);
    return weight >= least && (!typical || distance(x) <= farthest);
  }
  // What weighs less is cut off.
  __device__ void cut_below(double weight) {
    auto rounded = static_cast<float>(weight);
    if (rounded < weight) rounded = nextafterf(rounded, INFINITY);
    least = fmaxf(least, rounded);
    floor = fmaxf(floor, sampling::logit_of_weight(weight, max, temperature));
  }
};

// What a selection ranks tokens by, and adds up.
enum class Rank { tokens, weights, weights_by_distance };

// The token at which the sum over those that are kept, best first, reaches `need`, above 0: of
// their number, or of their weights. Best are the largest keys, equals by lower id; a key is a
// token's logit, or minus its distance. Keys lie in [low, high]. False if the sum never gets there.
//
// A histogram of the keys says in which bin the sum gets there; if that holds too many tokens to
// compare each with each, it is divided into bins in turn. Equal keys are divided by id.
__device__ inline bool select(Workspace& w, const Logits& row, const Kept& kept, Rank rank,
                              uint64_t need, float low, float high, float& found_key,
                              int32_t& found_id) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  constexpr float kNarrow = 1e-30f;  // too narrow for a quotient
  float order_low = static_cast<float>(1 - row.vocab_size), order_high = 0;  // of -id
  for (uint64_t before = 0;;) {
    const bool by_id = high * 0.25f - low * 0.25f < kNarrow;  // quarters: the width is finite
    const float from = by_id ? order_low : low, to = by_id ? order_high : high;
    const float width = to * 0.25f - from * 0.25f;
    const float bins_per_key = width < kNarrow ? 0.0f : (kBins - 1) / width;
    // The bin of a token, or -1.
    auto bin_of = [&](int id, float x, float& key, uint64_t& measure) {
      key = x;
      measure = 1;
      if (rank == Rank::tokens) {
        if (x < sampling::kLowestLogit) return -1;
      } else {
        float weight;
        if (!kept.holds(id, x, weight)) return -1;
        measure = units_of(weight);
        if (rank == Rank::weights_by_distance) key = -kept.distance(x);
      }
      const float order = static_cast<float>(-id);
      if (key < low || key > high || order < order_low || order > order_high) return -1;
      return min(static_cast<int>((to * 0.25f - (by_id ? order : key) * 0.25f) * bins_per_key),
                 kBins - 1);
    };

    for (int i = thread; i < kBins; i += threads) w.low[i] = w.high[i] = 0;
    if (thread == 0) {
      w.edge_bin = -1;
      w.num_edge = 0;
      w.edge_min = 0xffffffffu;
      w.edge_max = 0;
    }
    __syncthreads();
    row.for_each([&](int id, float x) {
      float key;
      uint64_t measure;
      const int bin = bin_of(id, x, key, measure);
      if (bin < 0) return;
      const auto word = static_cast<uint32_t>(measure);
      const bool carry = atomicAdd(&w.low[bin], word) + word < word;
      const uint32_t rest = static_cast<uint32_t>(measure >> 32) + carry;
      if (rest != 0) atomicAdd(&w.high[bin], rest);
    });
    __syncthreads();
    auto measure_of = [&](int bin) { return uint64_t{w.high[bin]} << 32 | w.low[bin]; };
    const int each = (kBins + threads - 1) / threads, begin = min(thread * each, kBins),
              end = min(begin + each, kBins);
    uint64_t own = 0;
    for (int i = begin; i < end; ++i) own += measure_of(i);
    uint64_t sum = before + sum_before(own, w.warps);
    if (sum < need && sum + own >= need) {  // of one thread at most
      int bin = begin;
      while (sum + measure_of(bin) < need) sum += measure_of(bin++);
      w.edge_bin = bin;
      w.before = sum;
    }
    __syncthreads();
    const int edge_bin = w.edge_bin;
    before = w.before;
    if (edge_bin < 0) return false;

    row.for_each([&](int id, float x) {
      float key;
      uint64_t measure;
      if (bin_of(id, x, key, measure) != edge_bin) return;
      const int i = atomicAdd(&w.num_edge, 1);
      if (i < kEdge) {
        w.edge_key[i] = key;
        w.edge_id[i] = id;
        w.edge_measure[i] = measure;
      }
      const uint32_t order = ordered(by_id ? static_cast<float>(-id) : key);
      atomicMin(&w.edge_min, order);
      atomicMax(&w.edge_max, order);
    });
    __syncthreads();
    const int n = w.num_edge;
    if (n <= kEdge) {
      for (int i = thread; i < n; i += threads) {
        uint64_t better = before;
        for (int j = 0; j < n; ++j) {
          if (ops::better(w.edge_key[j], w.edge_id[j], w.edge_key[i], w.edge_id[i])) {
            better += w.edge_measure[j];
          }
        }
        if (better < need && better + w.edge_measure[i] >= need) {
          w.found_key = w.edge_key[i];
          w.found_id = w.edge_id[i];
        }
      }
      __syncthreads();
      found_key = w.found_key;
      found_id = w.found_id;
      __syncthreads();
      return true;
    }
    (by_id ? order_low : low) = from_ordered(w.edge_min);
    (by_id ? order_high : high) = from_ordered(w.edge_max);
    __syncthreads();
  }
}

// Of what is kept.
struct Totals {
  uint64_t units;
  double total, log_total, entropy;
  float best;  // weight
};

__device__ inline Totals add_up(Workspace& w, const Logits& row, const Kept& kept) {
  uint64_t units = 0, surprise = 0;
  float best = 0;
  row.for_each([&](int id, float x) {
    float weight;
    if (!kept.holds(id, x, weight)) return;
    units += units_of(weight);
    surprise += units_of(sampling::product(weight, -sampling::log_weight(x, kept.max, kept.scale)));
    best = fmaxf(best, weight);
  });
  Totals t;
  t.units = block_sum(units, w.warps);
  surprise = block_sum(surprise, w.warps);
  t.best = block_max(best, w.maxima);
  t.total = weight_of_units(t.units);
  t.log_total = once(w, [&] { return log(t.total); });
  t.entropy = t.log_total + weight_of_units(surprise) / t.total;
  return t;
}

// The share of a sum at which a threshold lies.
__device__ inline uint64_t share_of(uint64_t units, double share) {
  const auto part = static_cast<uint64_t>(ceil(static_cast<double>(units) * share));
  return part < 1 ? 1 : part < units ? part : units;
}

// What is done to a row before its token is drawn, in this order: the tokens to list are found, of
// the model's logits and of the edited ones, and then each cut works on what the one before left.
enum Cut { listed, candidates, mirostat, top_k, top_p, min_p, typical, epsilon, eta, kCuts };

__device__ inline bool wants(const RowPlan& plan, int cut, int vocab_size) {
  if (cut == listed) return plan.num_listed > 0;
  if (cut == candidates || plan.num_candidates > 0) {
    return cut == candidates && plan.num_candidates > 0;
  }
  if (plan.temperature == 0) return false;
  if (cut == mirostat || plan.mirostat_tau > 0) return cut == mirostat && plan.mirostat_tau > 0;
  return cut == top_k     ? plan.top_k > 0 && plan.top_k < vocab_size
         : cut == top_p   ? plan.top_p < 1
         : cut == min_p   ? plan.min_p > 0
         : cut == typical ? plan.typical_p < 1
         : cut == epsilon ? plan.epsilon_cutoff > 0
                          : plan.eta_cutoff > 0;
}

// A threshold for the least weight: of the cuts that are no selection.
__device__ inline double least_weight(const RowPlan& plan, int cut, double mu, const Totals& t) {
  if (cut == mirostat) return sampling::least_by_mirostat(mu, t.total);
  if (cut == min_p) return plan.min_p;
  const double share =
      cut == eta ? sampling::epsilon_of_eta(plan.eta_cutoff, t.entropy) : plan.epsilon_cutoff;
  return sampling::least_by_epsilon(share, t.total, t.best);
}

// The first token, ids rising, at which the sum of the weights passes u times all of it. Each warp
// adds a part of the row; the one in whose part it happens goes over that again.
__device__ inline int32_t draw(Workspace& w, const Logits& row, const Kept& kept, double u,
                               uint64_t& total, float& weight) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, groups = row.groups();
  const int each = ((groups + 31) / 32 + warps - 1) / warps * 32;  // groups of a warp
  const int begin = min(warp * each, groups), end = min(begin + each, groups);
  uint64_t sum = 0;
  for (int g = begin + lane; g < end; g += 32) {
    row.visit(g, row.group(g), [&](int id, float x) {
      float weight_of_token;
      if (kept.holds(id, x, weight_of_token)) sum += units_of(weight_of_token);
    });
  }
  sum = warp_sum(sum);
  if (lane == 0) w.warps[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
  for (int i = 0; i < warps; ++i) {
    if (i == warp) before = total;
    total += w.warps[i];
  }
  auto target = static_cast<uint64_t>(u * static_cast<double>(total));
  if (target >= total) target = total - 1;
  if (before <= target && target < before + sum) {  // in the part of one warp
    for (int g0 = begin; before <= target; g0 += 32) {
      uint64_t own = 0;
      float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
      if (g0 + lane < end) {
        four = row.group(g0 + lane);
        row.visit(g0 + lane, four, [&](int id, float x) {
          float weight_of_token;
          if (kept.holds(id, x, weight_of_token)) own += units_of(weight_of_token);
        });
      }
      uint64_t until = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kAllLanes, until, step);
        if (lane >= step) until += other;
      }
      uint64_t running = before + until - own;
      if (running <= target && target < running + own) {
        row.visit(g0 + lane, four, [&](int id, float x) {
          float weight_of_token;
          if (!kept.holds(id, x, weight_of_token)) return;
          const uint64_t units = units_of(weight_of_token);
          if (running <= target && target < running + units) {
            w.found_id = id;
            w.found_key = weight_of_token;
          }
          running += units;
        });
      }
      before += __shfl_sync(kAllLanes, until, 31);
    }
  }
  __syncthreads();
  weight = w.found_key;
  const int32_t token = w.found_id;
  __syncthreads();
  return token;
}

// The lowest id of the largest logit, which is `max`.
__device__ inline int32_t argmax(Workspace& w, const Logits& row, float max) {
  if (threadIdx.x == 0) w.num_edge = row.vocab_size;
  __syncthreads();
  row.for_each([&](int id, float x) {
    if (x == max) atomicMin(&w.num_edge, id);
  });
  __syncthreads();
  const int32_t token = w.num_edge;
  __syncthreads();
  return token;
}

// Tokens down to the one with `key`, of equals those up to `last`, in any order; their number.
__device__ inline int list_from(Workspace& w, const Logits& row, float key, int32_t last,
                                const float* logits, ListedToken* out) {
  if (threadIdx.x == 0) w.num_edge = 0;
  __syncthreads();
  row.for_each([&](int id, float x) {
    if (x < key || (x == key && id > last)) return;
    out[atomicAdd(&w.num_edge, 1)] = {id, x, logits[id]};
  });
  __syncthreads();
  const int found = w.num_edge;
  __syncthreads();
  return found;
}

// A block per row. Rows that follow another and use Mirostat, whose threshold depends on the
// tokens before, are left to the first one's block, as far as its drafts hold.
// Budget of choose_kernel: 512 threads, 128 registers, 21008 bytes shared; LDG.128
__global__ void __launch_bounds__(kThreads)
    choose_kernel(LogitRows rows, int chunks, RowOutcome* outcomes, ListedToken* all_listed) {
  PYENGINE_SHARED(w, Workspace);
  start_after_previous();
  const RowPlan* const plans = rows.plans;
  const int vocab_size = rows.vocab_size;
  int r = static_cast<int>(blockIdx.x);
  const bool uses_mirostat = plans[r].mirostat_tau > 0 && plans[r].temperature > 0;
  if (uses_mirostat && plans[r].draft >= 0) return;
  double mu = plans[r].mirostat_mu;
  for (;; ++r) {
    const RowPlan& plan = plans[r];
    const LogitStats* stats = rows.stats + static_cast<int64_t>(r) * chunks;
    const Logits raw{rows.logits + static_cast<int64_t>(r) * vocab_size, vocab_size};
    const Logits row{plan.is_edited ? edited_row(rows, r) : raw.x, vocab_size};
    float raw_max = -INFINITY, raw_min = INFINITY, max = -INFINITY, min = INFINITY;
    for (int c = 0; c < chunks; ++c) {
      raw_max = fmaxf(raw_max, stats[c].raw_max);
      raw_min = fminf(raw_min, stats[c].raw_min);
      max = fmaxf(max, stats[c].max);
      min = fminf(min, stats[c].min);
    }
    auto usable = [](float best) { return best > -INFINITY && best < INFINITY; };
    int32_t token = !usable(raw_max) ? sampling::kNotFinite : usable(max) ? 0 : sampling::kNoneLeft;
    double log_total = 0;
    int num_listed = 0, num_candidates = 0;
    if (plan.is_scored && usable(raw_max)) log_total = log_total_of(stats, chunks, &w.number);

    Kept kept;
    kept.max = max;
    kept.temperature = plan.temperature;
    kept.scale = sampling::inverse_temperature(plan.temperature);
    for (int cut = listed; cut < kCuts; ++cut) {
      if (!wants(plan, cut, vocab_size)) continue;
      if (!usable(raw_max) || (cut != listed && !usable(max))) break;
      Totals t = {};
      if (cut >= mirostat && cut != top_k && cut != min_p) t = add_up(w, row, kept);
      uint64_t need;
      float low = fmaxf(min, kept.floor), high = max;
      Rank rank = Rank::tokens;
      if (cut == listed) {
        need = static_cast<uint64_t>(plan.num_listed);
        low = raw_min;
        high = raw_max;
      } else if (cut == candidates) {
        need = static_cast<uint64_t>(plan.num_candidates);
      } else if (cut == top_k) {
        need = static_cast<uint64_t>(plan.top_k);
      } else if (cut == top_p) {
        need = share_of(t.units, plan.top_p);
        rank = Rank::weights;
      } else if (cut == typical) {
        need = share_of(t.units, plan.typical_p);
        rank = Rank::weights_by_distance;
        kept.log_total = t.log_total;
        kept.entropy = t.entropy;
        low = -fmaxf(kept.distance(high), kept.distance(low));
        high = 0;
      } else {
        kept.cut_below(once(w, [&] { return least_weight(plan, cut, mu, t); }));
        continue;
      }
      const Logits ranked{cut == listed ? raw.x : row.x, vocab_size};
      float key;
      int32_t id;
      const bool found = select(w, ranked, kept, rank, need, low, high, key, id);
      if (cut == listed || cut == candidates) {
        ListedToken* const out =
            all_listed + plan.first_listed + (cut == listed ? 0 : plan.num_listed);
        const int n = list_from(w, ranked, found ? key : sampling::kLowestLogit,
                                found ? id : vocab_size, raw.x, out);
        (cut == listed ? num_listed : num_candidates) = n;
      } else if (found && cut == top_k) {
        kept.floor = key;
      } else if (found && cut == top_p) {
        kept.floor = kept.tie = key;
        kept.tie_id = id;
      } else if (found) {
        kept.typical = true;
        kept.farthest = -key;
      }
    }

    if (token == 0 && plan.num_candidates == 0) {
      if (plan.temperature == 0) {
        token = argmax(w, row, max);
      } else {
        const double u = uniform(plan.seed, plan.position, plan.sample_index);
        uint64_t total;
        float weight;
        token = draw(w, row, kept, u, total, weight);
        if (uses_mirostat) {
          mu = once(w, [&] {
            return sampling::next_mirostat_mu(mu, plan.mirostat_tau, plan.mirostat_eta,
                                              weight_of_units(total), weight);
          });
        }
      }
      if (plan.replay >= 0) token = plan.replay;
    }
    if (threadIdx.x == 0) {
      const bool has_token = token >= 0 && plan.num_candidates == 0;
      outcomes[r] = {log_total,     mu, token, has_token ? raw.x[token] : 0.0f, num_listed,
                     num_candidates};
    }
    if (!uses_mirostat || token < 0 || r + 1 == rows.count || plans[r + 1].draft != token) return;
  }
}

// Blocks of as many threads as there is work for, in whole warps.
unsigned threads_for(int32_t vocab_size) {
  return static_cast<unsigned>(std::clamp((vocab_size / 4 + 31) / 32 * 32, 64, kThreads));
}

}  // namespace

void choose_tokens(Stream& stream, const LogitRows& rows, RowOutcome* outcomes,
                   ListedToken* listed) {
  launch("choose", stream, choose_kernel, static_cast<unsigned>(rows.count),
         threads_for(rows.vocab_size), 0, rows, static_cast<int>(logit_stats_of(rows.vocab_size)),
         outcomes, listed);
}

}  // namespace pyengine::cuda

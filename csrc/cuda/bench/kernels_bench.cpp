// Times every launcher of cuda/kernels.h at the shapes of GPT-2 124M and 1.5B: a JSON line per
// case, after one that names the device and one with the bandwidth of a large copy. Launches are
// captured as a graph whose replays are timed by events; they take turns over as many sets of
// operands as exceed the caches, as the layers of a model do. Operands are random. `bytes` and
// `flops` are what no implementation can avoid: every input read once, every output written once, a
// multiply-add is two operations.
//
//     kernels_bench [--models 124M,1.5B] [--dtypes float16,bfloat16,float32] [--kernels dense,...]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/bench/harness.h"
#include "cuda/sampling.h"

namespace {

using namespace pyengine;               // NOLINT
using namespace pyengine::cuda;         // NOLINT
using namespace pyengine::cuda::bench;  // NOLINT

// So many sequences, each with `fresh` tokens at the end of `context` ones.
struct Ragged {
  int sequences, context, fresh;
  int tokens() const { return sequences * fresh; }
  int blocks() const { return (context + kBlockTokens - 1) / kBlockTokens; }  // of a sequence
};

struct CacheOperands {
  Tokens tokens;
  AttentionPlan plan;
  KVLayer cache;
  void *qkv, *out;
};

CacheOperands take_cache(Memory& memory, const ModelShape& model, DType act, DType kv, Ragged r) {
  std::vector<int32_t> positions, sequence, single, tiles, table(r.sequences * r.blocks());
  for (int b = 0; b < r.sequences; ++b) {
    const auto first = static_cast<int32_t>(positions.size());
    for (int i = 0; i < r.fresh; ++i) {
      positions.push_back(r.context - r.fresh + i);
      sequence.push_back(b);
    }
    if (r.fresh == 1) single.push_back(first);
    for (int i = 0; i < r.fresh && r.fresh > 1; i += kQueryTile) {
      tiles.insert(tiles.end(), {first + i, std::min(kQueryTile, r.fresh - i)});
    }
  }
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(1));
  std::vector<int32_t> slots;
  for (size_t t = 0; t < positions.size(); ++t) {
    const int block = table[sequence[t] * r.blocks() + positions[t] / kBlockTokens];
    slots.push_back(block * kBlockTokens + positions[t] % kBlockTokens);
  }
  CacheOperands o;
  o.tokens.positions = memory.integers(positions);
  o.tokens.slots = memory.integers(slots);
  o.tokens.sequence = memory.integers(sequence);
  o.tokens.block_table = memory.integers(table);
  o.tokens.count = r.tokens();
  o.tokens.max_blocks = r.blocks();
  o.plan.single = memory.integers(single);
  o.plan.tiles = memory.integers(tiles);
  o.plan.num_single = static_cast<int32_t>(single.size());
  o.plan.num_tiles = static_cast<int32_t>(tiles.size() / 2);
  o.plan.segments = (r.context + kDecodeSegment - 1) / kDecodeSegment;
  o.plan.partial = memory.take<float>(
      4 * partial_floats(o.plan.num_single, model.n_head, model.head_dim(), o.plan.segments));
  const size_t keys = table.size() * kBlockTokens * model.channels;
  o.cache.dtype = kv;
  o.cache.n_head = model.n_head;
  o.cache.head_dim = model.head_dim();
  o.cache.keys = memory.take(keys * size_of(kv));
  o.cache.values = memory.take(keys * size_of(kv));
  if (kv == DType::i8) {
    o.cache.key_scales = memory.take<float>(keys / model.head_dim() * 4);
    o.cache.value_scales = memory.take<float>(keys / model.head_dim() * 4);
  }
  o.qkv = memory.take(size_t{3} * r.tokens() * model.channels * size_of(act));
  o.out = memory.take(size_t{1} * r.tokens() * model.channels * size_of(act));
  return o;
}

std::string members(const ModelShape& model, DType kv, Ragged r) {
  return member("model", model.name) + member("kv", name_of(kv)) +
         member("sequences", r.sequences) + member("context", r.context) +
         member("fresh", r.fresh) + member("heads", model.n_head) +
         member("head_dim", model.head_dim());
}

// Bytes of the keys and values of so many tokens.
double kv_bytes(const ModelShape& model, DType kv, double tokens) {
  return 2 * tokens *
         (model.channels * double(size_of(kv)) + (kv == DType::i8 ? 4.0 * model.n_head : 0));
}

void bench_attention(Bench& bench, const ModelShape& model, DType act, DType kv, Ragged r) {
  const double channels = model.channels, before = r.context - r.fresh;
  // Query i of a sequence sees before + i + 1 keys.
  const double pairs = r.sequences * (r.fresh * before + r.fresh * (r.fresh + 1.0) / 2);
  const float scale = 1 / std::sqrt(static_cast<float>(model.head_dim()));
  bench.run({r.fresh == 1 ? "decode_attention" : "prefill_attention", members(model, kv, r), act,
             kv_bytes(model, kv, double(r.sequences) * r.context) +
                 2 * r.tokens() * channels * size_of(act),
             4 * channels * pairs, [&](Memory& memory) -> Launch {
               const CacheOperands o = take_cache(memory, model, act, kv, r);
               return [=, &bench] {
                 attention(bench.stream(), o.qkv, act, o.tokens, o.plan, o.cache, scale, o.out);
               };
             }});
}

void bench_write_kv(Bench& bench, const ModelShape& model, DType act, DType kv, Ragged r) {
  const double read = 2.0 * r.tokens() * model.channels * size_of(act);
  bench.run({"write_kv", members(model, kv, r), act, read + kv_bytes(model, kv, r.tokens()), 0,
             [&](Memory& memory) -> Launch {
               const CacheOperands o = take_cache(memory, model, act, kv, r);
               return [=, &bench] { write_kv(bench.stream(), o.qkv, act, o.tokens, o.cache); };
             }});
}

void bench_caches(Bench& bench, const ModelShape& model, DType act) {
  const Options& options = bench.options();
  std::vector<Ragged> decode, prefill, written = {{1, 512, 1}, {64, 512, 1}, {1, 512, 512}};
  for (int sequences : {1, 8, 32, 64}) {
    for (int context : {16, 512, 1000}) decode.push_back({sequences, context, 1});
  }
  prefill = {{1, 512, 512}, {8, 512, 512}, {1, 1000, 64}};
  if (options.tiny()) decode = {{2, 50, 1}}, prefill = {{2, 50, 20}}, written = {{2, 50, 3}};
  for (DType kv : {act, DType::i8}) {
    for (const Ragged& r : decode) {
      if (options.wants("decode_attention")) bench_attention(bench, model, act, kv, r);
    }
    for (const Ragged& r : prefill) {
      if (options.wants("prefill_attention")) bench_attention(bench, model, act, kv, r);
    }
    for (const Ragged& r : written) {
      if (options.wants("write_kv")) bench_write_kv(bench, model, act, kv, r);
    }
  }
}

// The dense layers of a block, and the head.
struct DenseLayer {
  const char* name;
  int k, n;  // in channels; n of the head is the vocabulary
  Output output;
  ops::Activation activation;
};
constexpr DenseLayer kDenseLayers[] = {
    {"c_attn", 1, 3, Output::act, ops::Activation::none},
    {"attn_c_proj", 1, 1, Output::add, ops::Activation::none},
    {"c_fc", 1, 4, Output::act, ops::Activation::gelu_tanh},
    {"mlp_c_proj", 4, 1, Output::add, ops::Activation::none},
    {"head", 1, 0, Output::f32, ops::Activation::none},
};
// As the model calls them: after a layer norm, keys and values to the cache.
constexpr DenseLayer kDenseLayersOfNorms[] = {
    {"c_attn", 1, 3, Output::qkv, ops::Activation::none},
    {"c_fc", 1, 4, Output::act, ops::Activation::gelu_tanh},
};

// What a dense layer's weights are.
enum class Weights { act, int8, int4 };

const char* name_of(Weights weights, DType act) {
  return weights == Weights::act ? name_of(act) : weights == Weights::int8 ? "int8" : "int4";
}

double bytes_of(Weights weights, DType act, int64_t k, int64_t n) {
  const double elements = double(n) * k;
  if (weights == Weights::act) return elements * size_of(act);
  return (weights == Weights::int8 ? elements : elements / 2 + elements / 32) + 4.0 * n;
}

// Random integers and groups are as good as those of a file.
QuantizedMatrix take_quantized(Memory& memory, Weights weights, int64_t k, int64_t n) {
  QuantizedMatrix w;
  w.k = k;
  w.n = n;
  const bool nibbles = weights == Weights::int4;
  w.integers = memory.take<uint8_t>(nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n));
  if (nibbles) w.groups = memory.take<uint8_t>(ops::group_bytes(k, n));
  w.scale = memory.take<float>(n * 4);
  return w;
}

void bench_dense(Bench& bench, const ModelShape& model, DType act, const DenseLayer& l, int m,
                 bool of_norm, Weights weights, Blas* blas) {
  const bool head = l.n == 0;
  const int64_t k = int64_t{l.k} * model.channels;
  const int64_t n = head ? model.vocab : int64_t{l.n} * model.channels;
  const bool in_act = l.output == Output::act || l.output == Output::qkv;
  const size_t out_size = in_act ? size_of(act) : 4, x_size = of_norm ? 4 : size_of(act);
  double bytes = bytes_of(weights, act, k, n) + double(m) * k * x_size + double(m) * n * out_size;
  if (l.output == Output::add) bytes += 4.0 * m * n;  // read, too
  if (!head) bytes += 4.0 * n;
  if (of_norm) bytes += 8.0 * k;
  const std::string shape = member("model", model.name) + member("layer", l.name) +
                            member("by", blas != nullptr ? "cuBLASLt" : "pyengine") +
                            member("weights", name_of(weights, act)) + member("rows", m) +
                            member("k", k) + member("n", n);
  auto prepare = [=, &bench, &model](Memory& memory) -> Launch {
    Dense layer;
    layer.k = k;
    layer.n = n;
    if (weights == Weights::act) {
      layer.weight = memory.take(n * k * size_of(act));
    } else {
      layer.quantized = take_quantized(memory, weights, k, n);
    }
    if (!head) {
      layer.bias = memory.take<float>(n * 4);
      layer.bias_act = memory.take(n * size_of(act));
    }
    const void* x = memory.take(m * k * x_size);
    DenseResult result;
    result.output = l.output;
    result.activation = l.activation;
    result.out = memory.take(m * n * out_size);
    if (l.output == Output::qkv) {
      const CacheOperands o = take_cache(memory, model, act, act, {m, kBlockTokens, 1});
      result.tokens = o.tokens;
      result.cache = o.cache;
    }
    if (blas != nullptr) {
      return [=, &bench] { blas->dense(bench.stream(), x, act, m, layer, result); };
    }
    if (!of_norm) {
      return [=, &bench] { dense(bench.stream(), nullptr, x, act, m, layer, result); };
    }
    const Norm norm{memory.take<float>(4 * k), memory.take<float>(4 * k), 1e-5f};
    void* normed = memory.take(m * k * size_of(act));
    return [=, &bench] {
      dense_of_norm(bench.stream(), nullptr, static_cast<const float*>(x), norm, normed, act, m,
                    layer, result);
    };
  };
  bench.run({of_norm ? "dense_of_norm" : "dense", shape, act, bytes, 2.0 * m * k * n, prepare});
}

void bench_dense_layers(Bench& bench, const ModelShape& model, DType act) {
  const Options& options = bench.options();
  const int few = act == DType::f32 ? kFewRowsF32 : kFewRows;
  std::vector<int> rows = {1, 8, 64, 512};
  if (act == DType::f16) rows = {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048};
  if (options.tiny()) rows = {1, few + 1};
  for (const DenseLayer& layer : kDenseLayers) {
    for (int m : rows) {
      if (!options.wants("dense")) continue;
      for (Weights weights : {Weights::act, Weights::int8, Weights::int4}) {
        bench_dense(bench, model, act, layer, m, false, weights, nullptr);
      }
      if (m > kFewRowsF32 && bench.blas() != nullptr) {
        bench_dense(bench, model, act, layer, m, false, Weights::act, bench.blas());
      }
    }
  }
  for (const DenseLayer& layer : kDenseLayersOfNorms) {
    for (int m : rows) {
      if (m > few || !options.wants("dense_of_norm")) continue;
      bench_dense(bench, model, act, layer, m, true, Weights::act, nullptr);
    }
  }
}

void bench_layer_norm(Bench& bench, const ModelShape& model, DType act, int rows) {
  const int c = model.channels;
  bench.run({"layer_norm",
             member("model", model.name) + member("rows", rows) + member("channels", c), act,
             double(rows) * c * (4 + size_of(act)) + 8.0 * c, 0, [&](Memory& memory) -> Launch {
               const auto* x = memory.take<float>(size_t{4} * rows * c);
               const auto *gain = memory.take<float>(4 * c), *bias = memory.take<float>(4 * c);
               void* out = memory.take(size_of(act) * rows * c);
               return [=, &bench] {
                 layer_norm(bench.stream(), x, nullptr, rows, c, {gain, bias, 1e-5f}, out, act);
               };
             }});
}

void bench_embed(Bench& bench, const ModelShape& model, DType act, Weights weights, int rows) {
  const int c = model.channels;
  std::vector<int32_t> ids(rows), positions(rows);
  std::mt19937 engine(1);
  for (int t = 0; t < rows; ++t) {
    ids[t] = static_cast<int32_t>(engine() % model.vocab);
    positions[t] = t % model.positions;
  }
  const std::string shape = member("model", model.name) + member("weights", name_of(weights, act)) +
                            member("rows", rows) + member("channels", c);
  const double read = bytes_of(weights, act, c, rows) + double(rows) * c * size_of(act);
  bench.run({"embed", shape, act, read + 4.0 * rows * c, 0, [&](Memory& memory) -> Launch {
               Tokens tokens;
               tokens.ids = memory.integers(ids);
               tokens.positions = memory.integers(positions);
               tokens.count = rows;
               const void* wpe = memory.take(size_of(act) * model.positions * c);
               auto* x = memory.take<float>(size_t{4} * rows * c);
               if (weights == Weights::act) {
                 const void* wte = memory.take(size_of(act) * model.vocab * c);
                 return [=, &bench] { embed(bench.stream(), tokens, wte, wpe, act, c, x); };
               }
               const QuantizedMatrix wte = take_quantized(memory, weights, c, model.vocab);
               return [=, &bench] { embed(bench.stream(), tokens, wte, wpe, act, x); };
             }});
}

void bench_copy_blocks(Bench& bench, const ModelShape& model, DType act, int blocks) {
  const size_t bytes = size_t{kBlockTokens} * model.channels * size_of(act);
  std::vector<int32_t> pairs(2 * blocks);  // from the first half to the second
  for (int i = 0; i < blocks; ++i) pairs[2 * i] = i, pairs[2 * i + 1] = blocks + i;
  bench.run({"copy_blocks",
             member("model", model.name) + member("blocks", blocks) +
                 member("block_bytes", static_cast<int64_t>(bytes)),
             act, 2.0 * blocks * bytes, 0, [&](Memory& memory) -> Launch {
               void* keys = memory.take(2 * blocks * bytes);
               const int32_t* device_pairs = memory.integers(pairs);
               return
                   [=, &bench] { copy_blocks(bench.stream(), keys, bytes, device_pairs, blocks); };
             }});
}

// Of c_fc, as it lies in a file: (C, 4C) float32 or float16.
void bench_convert_weight(Bench& bench, const ModelShape& model, DType act, DType from) {
  const int64_t k = model.channels, n = 4 * k;
  bench.run({"convert_weight",
             member("model", model.name) + member("from", name_of(from)) + member("k", k) +
                 member("n", n),
             act, double(n) * k * (size_of(from) + size_of(act)), 0, [&](Memory& memory) -> Launch {
               const void* src = memory.take(n * k * size_of(from));
               void* dst = memory.take(n * k * size_of(act));
               return
                   [=, &bench] { convert_weight(bench.stream(), src, from, true, n, k, dst, act); };
             }});
}

// Of c_fc, from the order of a file to that of lanes.
void bench_arrange(Bench& bench, const ModelShape& model, Weights weights) {
  const int64_t k = model.channels, n = 4 * k;
  const bool nibbles = weights == Weights::int4;
  const int64_t bytes = nibbles ? ops::nibble_bytes(k, n) : ops::int8_bytes(k, n);
  const std::string shape = member("model", model.name) +
                            member("weights", name_of(weights, DType::f16)) + member("k", k) +
                            member("n", n);
  bench.run({"arrange_integers", shape, DType::f16, 2.0 * bytes, 0, [&](Memory& memory) -> Launch {
               const void* src = memory.take(bytes);
               const auto dst = take_quantized(memory, weights, k, n);
               return [=, &bench] {
                 arrange_integers(bench.stream(), src, nibbles, k, n,
                                  const_cast<uint8_t*>(dst.integers));
               };
             }});
}

// What a row asks for. Of logits that are N(0, 0.05) a temperature of 0.02 makes those of a model.
struct SamplingCase {
  const char* controls;
  std::function<void(sampling::RowPlan&)> set;
};
const SamplingCase kSamplingCases[] = {
    {"greedy", [](sampling::RowPlan& p) { p.temperature = 0; }},
    {"temperature", [](sampling::RowPlan&) {}},
    {"top_k 50", [](sampling::RowPlan& p) { p.top_k = 50; }},
    {"top_p 0.9", [](sampling::RowPlan& p) { p.top_p = 0.9; }},
    {"everything, top_k 50",
     [](sampling::RowPlan& p) {
       p.top_k = 50, p.top_p = 0.9, p.min_p = 1e-3, p.typical_p = 0.95, p.epsilon_cutoff = 1e-4;
       p.eta_cutoff = 1e-3, p.num_listed = 5, p.is_scored = p.is_edited = true;
     }},
    {"everything but top_k",
     [](sampling::RowPlan& p) {
       p.top_p = 0.9, p.min_p = 1e-5, p.typical_p = 0.95, p.epsilon_cutoff = 1e-6;
       p.eta_cutoff = 1e-5, p.num_listed = 5, p.is_scored = p.is_edited = true;
     }},
};

// scan and choose; 20 biases, 300 penalised tokens and a mask where there are edits.
void bench_sampling(Bench& bench, const ModelShape& model, DType act, const SamplingCase& c,
                    int rows) {
  const int vocab = model.vocab, num_penalties = std::min(300, vocab), num_biases = 20;
  std::vector<sampling::RowPlan> plans(rows);
  for (int r = 0; r < rows; ++r) {
    sampling::RowPlan& p = plans[r];
    p.temperature = 0.02f;
    p.seed = r;
    c.set(p);
    p.first_listed = r * p.num_listed;
    if (!p.is_edited) continue;
    p.num_biases = num_biases;
    p.num_penalties = num_penalties;
    p.first_mask_word = 0;
    p.repetition_penalty = 1.1f;
  }
  std::vector<sampling::TokenBias> biases(num_biases);
  for (int i = 0; i < num_biases; ++i) biases[i] = {i * vocab / num_biases, -0.1f};
  std::vector<sampling::TokenCount> penalties(num_penalties);
  for (int i = 0; i < num_penalties; ++i) penalties[i] = {i * (vocab / num_penalties), 1};
  const std::vector<uint32_t> mask((vocab + 31) / 32, 0xffffefffu);
  bench.run({"sampling",
             member("model", model.name) + member("rows", rows) + member("controls", c.controls),
             act, 4.0 * rows * vocab, 0, [&](Memory& memory) -> Launch {
               auto upload = [&](const auto& values) {
                 const size_t bytes = values.size() * sizeof(values[0]);
                 void* device = memory.take(bytes);
                 bench.stream().upload(device, values.data(), bytes);
                 bench.stream().wait();
                 return device;
               };
               const size_t bytes = (size_t(rows) * vocab + kLogitPadding) * sizeof(float);
               LogitRows logits;
               // Of the numbers that memory holds, those of act, float32 ones are made.
               auto* values = memory.take<float>(bytes);
               convert_weight(bench.stream(), memory.take(bytes), act, false, 1,
                              int64_t{rows} * vocab, values, DType::f32);
               logits.logits = values;
               logits.edited = memory.take<float>(rows * edited_stride(vocab) * sizeof(float));
               logits.stats =
                   memory.take<LogitStats>(sizeof(LogitStats) * rows * logit_stats_of(vocab));
               logits.count = rows;
               logits.vocab_size = vocab;
               logits.plans = static_cast<const sampling::RowPlan*>(upload(plans));
               SamplingArrays arrays;
               arrays.rows = logits.plans;
               arrays.biases = static_cast<const sampling::TokenBias*>(upload(biases));
               arrays.penalties = static_cast<const sampling::TokenCount*>(upload(penalties));
               arrays.masks = static_cast<const uint32_t*>(upload(mask));
               auto* outcomes =
                   memory.take<sampling::RowOutcome>(rows * sizeof(sampling::RowOutcome));
               auto* listed =
                   memory.take<sampling::ListedToken>(rows * 5 * sizeof(sampling::ListedToken));
               return [=, &bench] {
                 scan_logits(bench.stream(), logits, arrays, false);
                 choose_tokens(bench.stream(), logits, outcomes, listed);
               };
             }});
}

void bench_all(Bench& bench, const ModelShape& model, DType act) {
  const Options& options = bench.options();
  bench_dense_layers(bench, model, act);
  bench_caches(bench, model, act);
  for (int rows : options.tiny() ? std::vector<int>{3} : std::vector<int>{1, 8, 64, 512, 2048}) {
    if (options.wants("layer_norm")) bench_layer_norm(bench, model, act, rows);
    for (Weights weights : {Weights::act, Weights::int8, Weights::int4}) {
      if (options.wants("embed")) bench_embed(bench, model, act, weights, rows);
    }
  }
  for (int rows : options.tiny() ? std::vector<int>{3} : std::vector<int>{1, 16, 64, 256}) {
    if (!options.wants("sampling")) break;
    for (const SamplingCase& c : kSamplingCases) bench_sampling(bench, model, act, c, rows);
  }
  for (int blocks : options.tiny() ? std::vector<int>{2} : std::vector<int>{1, 16, 64}) {
    if (options.wants("copy_blocks")) bench_copy_blocks(bench, model, act, blocks);
  }
  for (DType from : {DType::f32, DType::f16}) {
    if (options.wants("convert_weight")) bench_convert_weight(bench, model, act, from);
  }
  for (Weights weights : {Weights::int8, Weights::int4}) {
    if (act == DType::f16 && options.wants("arrange_integers")) {
      bench_arrange(bench, model, weights);
    }
  }
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> found;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    if (end > at) found.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return found;
}

Options parse(int argc, char** argv) {
  Options options{{"124M", "1.5B"}, {"float16", "bfloat16", "float32"}, {}};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    auto* list = name == "--models"    ? &options.models
                 : name == "--dtypes"  ? &options.dtypes
                 : name == "--kernels" ? &options.kernels
                                       : nullptr;
    if (list == nullptr || i + 1 == argc) {
      std::fprintf(stderr, "usage: %s [--models A,B] [--dtypes A,B] [--kernels A,B]\n", argv[0]);
      std::exit(2);
    }
    *list = words(argv[i + 1]);
  }
  return options;
}

void bench_chosen(const Options& options) {
  const DeviceInfo device = open_device();
  std::printf("{\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d}\n",
              device.name.c_str(), device.major, device.minor, device.multiprocessors);
  Bench bench(options);
  bench.copy_bandwidth();
  for (const ModelShape& model : kModels) {
    for (DType act : {DType::f16, DType::bf16, DType::f32}) {
      auto chosen = [](const std::vector<std::string>& names, const char* name) {
        return std::find(names.begin(), names.end(), name) != names.end();
      };
      if (act == DType::bf16 && device.major < 8) continue;
      if (!chosen(options.models, model.name) || !chosen(options.dtypes, name_of(act))) continue;
      bench_all(bench, model, act);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench_chosen(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

#include "cpu/dispatch.h"

#include "core/errors.h"
#include "cpu/amx_permission.h"
#include "cpu/isa_tables.h"

namespace pyengine::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
  bool by_name_only = false;
};

#if defined(__x86_64__)

// AVX-512 BF16 is an independent feature: it replaces the bfloat16 dense kernels and nothing else.
const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kernels();
    k.isa = "avx512_bf16";
    k.dense_bf16 = avx512_bf16::dense_bf16();
    return k;
  }();
  return kernels;
}

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kernels();
    k.isa = "amx";
    k.attention_bf16 = amx::attention_bf16();
    k.attention_i8 = amx::attention_i8();
    return k;
  }();
  return kernels;
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
std::vector<Choice> choices() {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Both give the same bits for normal numbers; which is faster depends on the processor.
  static const bool slow_bf16 = bf16 && !avx512_bf16::dot_is_faster_than_fma();
  return {{&baseline::kernels(), true},
          {&avx2::kernels(), avx2},
          {&avx512::kernels(), avx512},
          {&avx512_bf16_kernels(), bf16, slow_bf16},
          {&amx_kernels(), bf16 && amx_permitted()}};
}

#else

std::vector<Choice> choices() { return {{&baseline::kernels(), true}}; }

#endif

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Choice& c : choices()) {
    if (c.supported) names.emplace_back(c.kernels->isa);
  }
  return names;
}

const Kernels& kernels_for(const char* name) {
  const std::vector<Choice> all = choices();
  const bool any = name == nullptr || *name == '\0';
  const Kernels* best = nullptr;
  bool known = false;
  std::string names;
  for (const Choice& c : all) {
    bool match = !any && c.kernels->isa == std::string(name);
    known = known || match;
    if (!c.supported) continue;
    if (any ? !c.by_name_only : match) best = c.kernels;
    names += (names.empty() ? "" : ", ") + std::string(c.kernels->isa);
  }
  if (best == nullptr) {
    throw ConfigError(
        "instruction set \"" + std::string(name) + "\" " +
        (known ? "is not supported by this processor" : "does not exist in this build") +
        "; available here: " + names + " (argument isa or environment PYENGINE_ISA)");
  }
  return *best;
}

}  // namespace pyengine::cpu

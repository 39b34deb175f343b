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

// AVX-VNNI, AVX-512 VNNI and AVX-512 BF16 are features of their own: each replaces the
// kernels of the types that it computes with.
const Kernels& avx_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx2::kernels();
    k.isa = "avx_vnni";
    k.dense_int8 = avx_vnni::dense_int8();
    k.dense_int4 = avx_vnni::dense_int4();
    k.attention_i8 = avx_vnni::attention_i8();
    return k;
  }();
  return kernels;
}

const Kernels& avx512_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kernels();
    k.isa = "avx512_vnni";
    k.dense_int8 = avx512_vnni::dense_int8();
    k.dense_int4 = avx512_vnni::dense_int4();
    k.attention_i8 = avx512_vnni::attention_i8();
    return k;
  }();
  return kernels;
}

const Kernels& avx512_bf16_kernels(bool vnni) {
  static const Kernels kernels = [vnni] {
    Kernels k = vnni ? avx512_vnni_kernels() : avx512::kernels();
    k.isa = "avx512_bf16";
    k.dense_bf16 = avx512_bf16::dense_bf16();
    return k;
  }();
  return kernels;
}

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_vnni_kernels();
    k.isa = "amx";
    k.dense_bf16 = amx::dense_bf16();
    k.attention_bf16 = amx::attention_bf16();
    k.attention_i8 = amx::attention_i8();
    k.dense_int8 = amx::dense_int8();
    k.dense_int4 = amx::dense_int4();
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
  bool avx_vnni = avx2 && __builtin_cpu_supports("avxvnni");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Both give the same bits for normal numbers; which is faster depends on the processor.
  static const bool slow_bf16 = bf16 && !avx512_bf16::dot_is_faster_than_fma();
  return {{&baseline::kernels(), true},
          {&avx2::kernels(), avx2},
          {&avx_vnni_kernels(), avx_vnni},
          {&avx512::kernels(), avx512},
          {&avx512_vnni_kernels(), vnni},
          {&avx512_bf16_kernels(vnni), bf16, slow_bf16},
          {&amx_kernels(), bf16 && vnni && amx_permitted()}};
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

// The choice of an instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pyengine::cpu {

// What this build has and this processor and operating system can run, slowest first.
std::vector<std::string> available_isas();

// The kernels of that name, or the best available for null or "". Throws ConfigError naming the
// choices.
const Kernels& kernels_for(const char* name);

}  // namespace pyengine::cpu

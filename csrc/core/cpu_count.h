// How many processors this process may really use.
#pragma once

#include <string>

namespace pyengine {

// Affinity mask and cgroup CPU quota (rounded up), at least 1.
int usable_cpus();

// The CPU quota of this process's cgroup (v2 or v1) or of one above it, in processors, rounded up;
// 0 without a quota. `root` stands before /proc and /sys, so that tests can bring their own files.
int cgroup_cpu_limit(const std::string& root);

}  // namespace pyengine

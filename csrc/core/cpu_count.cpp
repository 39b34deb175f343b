#include "core/cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>

namespace pyengine {

namespace {

int affinity_cpus() {
  // The kernel refuses a mask smaller than its own, so grow it until it fits.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    size_t bytes = CPU_ALLOC_SIZE(cpus);
    CPU_ZERO_S(bytes, set);
    int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// The whole file, or nothing. Not by streams: where two copies of libstdc++ are in one process, as
// with other people's extension modules, their locales clash.
std::string contents(const std::string& path) {
  std::string text;
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return text;
  char piece[4096];
  for (size_t n; (n = std::fread(piece, 1, sizeof piece, file)) > 0;) text.append(piece, n);
  std::fclose(file);
  return text;
}

int rounded_up(double quota, double period) {
  if (quota <= 0 || period <= 0) return 0;
  return std::max(1, static_cast<int>((quota + period - 1) / period));
}

int v2_limit(const std::string& directory) {  // "max 100000" or "150000 100000"
  double quota = 0, period = 0;
  const std::string text = contents(directory + "/cpu.max");
  return std::sscanf(text.c_str(), "%lf %lf", &quota, &period) == 2 ? rounded_up(quota, period) : 0;
}

int v1_limit(const std::string& directory) {
  double quota = 0, period = 0;  // -1: no quota
  const std::string quota_text = contents(directory + "/cpu.cfs_quota_us");
  const std::string period_text = contents(directory + "/cpu.cfs_period_us");
  const bool both = std::sscanf(quota_text.c_str(), "%lf", &quota) == 1 &&
                    std::sscanf(period_text.c_str(), "%lf", &period) == 1;
  return both ? rounded_up(quota, period) : 0;
}

// The smallest limit on the way from `path` up to the root of the hierarchy: a child's quota does
// not lift its parent's. In a container the path may not exist below the mount point; its root
// does.
int limit_upwards(const std::string& mount, std::string path, int (*limit)(const std::string&)) {
  int best = 0;
  while (true) {
    int here = limit(mount + path);
    if (here > 0 && (best == 0 || here < best)) best = here;
    if (path.empty() || path == "/") return best;
    path.erase(path.rfind('/'));
  }
}

}  // namespace

int cgroup_cpu_limit(const std::string& root) {
  const std::string text = contents(root + "/proc/self/cgroup");
  int best = 0;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);  // "0::/a/b", "4:cpu,cpuacct:/a/b"
    size_t first = line.find(':');
    size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    int here = 0;
    if (controllers.empty()) {
      here = limit_upwards(root + "/sys/fs/cgroup", path, v2_limit);
    } else {
      if (("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
      here = limit_upwards(root + "/sys/fs/cgroup/" + controllers, path, v1_limit);
      if (here == 0) here = limit_upwards(root + "/sys/fs/cgroup/cpu", path, v1_limit);
    }
    if (here > 0 && (best == 0 || here < best)) best = here;
  }
  return best;
}

int usable_cpus() {
  int cpus = affinity_cpus();
  int quota = cgroup_cpu_limit("");
  return quota > 0 ? std::min(cpus, quota) : cpus;
}

}  // namespace pyengine

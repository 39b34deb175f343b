// Where the time of a step goes: calls, time, bytes and operations of each of its parts.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace pyengine {

enum class Part : uint8_t {
  prepare,  // checks before the first op, and whatever lies between ops
  copy_blocks,
  embed,
  layer_norm,
  qkv,
  attention,
  attn_proj,
  mlp_fc,
  mlp_proj,
  gather,  // rows of the last layer that somebody reads
  head,
  score,
  sampling,
};
constexpr int kNumParts = static_cast<int>(Part::sampling) + 1;

inline const char* name_of(Part part) {
  constexpr const char* names[kNumParts] = {
      "prepare", "copy_blocks", "embed",  "layer_norm", "qkv",   "attention", "attn_proj",
      "mlp_fc",  "mlp_proj",    "gather", "head",       "score", "sampling"};
  return names[static_cast<int>(part)];
}

// What no implementation can avoid: every input read once, every output written once; a
// multiply-add is two operations.
struct Cost {
  int64_t bytes = 0;
  int64_t operations = 0;
};

struct PartTotals {
  int64_t calls = 0;
  int64_t nanoseconds = 0;
  Cost cost;
};

class Profile {
 public:
  int64_t steps() const { return steps_; }
  const PartTotals& operator[](Part part) const { return parts_[static_cast<int>(part)]; }

  // From now to the next part, or to the end of the step, the time is this part's.
  void enter(Part part, Cost cost = {}) {
    const auto now = Clock::now();
    close(now);
    PartTotals& totals = parts_[static_cast<int>(part)];
    totals.calls += 1;
    totals.cost.bytes += cost.bytes;
    totals.cost.operations += cost.operations;
    part_ = &totals;
    since_ = now;
  }
  void end_step() {
    close(Clock::now());
    steps_ += 1;
  }

 private:
  using Clock = std::chrono::steady_clock;

  void close(Clock::time_point now) {
    if (part_ == nullptr) return;
    part_->nanoseconds +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count();
    part_ = nullptr;
  }

  std::array<PartTotals, kNumParts> parts_{};
  int64_t steps_ = 0;
  PartTotals* part_ = nullptr;  // the one that the time now is
  Clock::time_point since_;
};

// A step, however it ends. Where nobody profiles (null), entering a part is one comparison.
class ProfiledStep {
 public:
  explicit ProfiledStep(Profile* profile) : profile_(profile) { enter(Part::prepare); }
  ~ProfiledStep() {
    if (profile_ != nullptr) profile_->end_step();
  }
  ProfiledStep(const ProfiledStep&) = delete;
  ProfiledStep& operator=(const ProfiledStep&) = delete;

  bool on() const { return profile_ != nullptr; }
  void enter(Part part, Cost cost = {}) {
    if (profile_ != nullptr) profile_->enter(part, cost);
  }

 private:
  Profile* profile_;
};

}  // namespace pyengine

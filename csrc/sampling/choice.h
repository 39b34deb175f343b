// From the edited logits of one row to its token.
#pragma once

#include <vector>

#include "sampling/params.h"
#include "sampling/row.h"

namespace pyengine::sampling {

// Where to find what the cut-offs leave of a loaded row.
enum class Kept {
  all,         // nothing is cut off: the row's weights are set, and `total` is their sum
  weighted,    // the tokens that weigh anything among the row's weights; `total` as above
  candidates,  // in `candidates`, with weights
};

// Temperature above 0.
Kept cut_off(Row& row, const SlotParams& params, double mirostat_mu, int32_t vocab_size,
             std::vector<Candidate>& candidates, double& total);

// The token of a loaded row. u in [0, 1). Moves mirostat_mu where Mirostat is on.
int32_t choose(Row& row, const SlotParams& params, int32_t vocab_size, double u,
               std::vector<Candidate>& candidates, double& mirostat_mu);

}  // namespace pyengine::sampling

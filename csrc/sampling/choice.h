// From the edited logits of one row to its token.
#pragma once

#include <vector>

#include "sampling/params.h"
#include "sampling/row.h"

namespace pyengine::sampling {

// What the cut-offs leave of a loaded row, with weights; temperature above 0. False if nothing is
// cut off: the row's own weights are then set, and `total` is their sum.
bool cut_off(Row& row, const SlotParams& params, double mirostat_mu, int32_t vocab_size,
             std::vector<Candidate>& candidates, double& total);

// The token of a loaded row. u in [0, 1). Moves mirostat_mu where Mirostat is on.
int32_t choose(Row& row, const SlotParams& params, int32_t vocab_size, double u,
               std::vector<Candidate>& candidates, double& mirostat_mu);

}  // namespace pyengine::sampling

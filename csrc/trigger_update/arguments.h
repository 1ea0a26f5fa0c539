#pragma once

// From tensors to the parameters of a triggers' update, with every check that keeps a kernel from
// touching what is not there.

#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/common/check.h"
#include "csrc/trigger_update/core.h"

namespace pydetox {

// The tensors of one call, as the schema orders them.
struct TriggerUpdateTensors {
  Tensor mask_logits, pattern_logits, mask_gradient, pattern_gradient;
  Tensor mask_first, pattern_first, mask_second, pattern_second;
  Tensor cost, learning_rate;
  std::optional<Tensor> variation;
  Tensor steps, active;
  std::optional<Tensor> best_mask, best_pattern, best_norm, eligible;
};

// Parameters and the tensors that own what they point to. Everything that is written must be
// contiguous and apart from everything else; gradients that are not contiguous are copied.
struct TriggerUpdate {
  TriggerUpdate(const TriggerUpdateTensors& tensors, double beta1, double beta2, double epsilon);
  TriggerUpdateParams params{};
  Tensor norms;

 private:
  TriggerUpdateTensors tensors_;
  Tensor partials_, plans_, signs_;
};

}  // namespace pydetox

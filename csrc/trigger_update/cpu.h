#pragma once

// The CPU kernels of the triggers' update, one set per instruction set. An item is a chunk of one
// trigger and owns its part of the results.

#include <cstdint>

#include "csrc/trigger_update/core.h"

namespace pydetox::cpu {

struct TriggerUpdateKernels {
  // Items: trigger k, chunk c of its mask, at k * mask_chunks() + c.
  void (*mask)(const TriggerUpdateParams&, int64_t begin, int64_t end);
  // Items: trigger k, chunk c of mask and then pattern, at k * chunks() + c.
  void (*move)(const TriggerUpdateParams&, int64_t begin, int64_t end);
};

// The kernels for the capability in use (csrc/common/capability.h).
const TriggerUpdateKernels& trigger_update_kernels();

}  // namespace pydetox::cpu

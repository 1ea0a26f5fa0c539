#pragma once

// The CPU kernels of the objectives, one set per instruction set. An item owns its part of the
// results, so that the bits do not depend on who computes it.

#include <cstdint>

#include "csrc/objectives/core.h"

namespace pydetox::cpu {

// Rows of all triggers in groups of kGroupRows, shared out over `items` whose workspace fits in the
// second-level cache.
constexpr int64_t kGroupRows = 16;
struct RowTiling {
  int64_t groups;
  int64_t items;

  int64_t begin(int64_t item) const { return item * groups / items; }
};
RowTiling row_tiling(const ZeroShotParams& params, int64_t threads);

struct ObjectiveKernels {
  // Items: triggers.
  void (*collapse)(const CollapseParams&, int64_t begin, int64_t end);
  void (*collapse_gradient)(const CollapseParams&, int64_t begin, int64_t end);
  // Items: of the tiling. Writes losses and hits of rows, and their gradients.
  void (*zero_shot)(const ZeroShotParams&, const RowTiling&, int64_t begin, int64_t end);
};

// The kernels for the capability in use (csrc/common/capability.h).
const ObjectiveKernels& objective_kernels();

}  // namespace pydetox::cpu

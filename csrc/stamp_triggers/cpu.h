#pragma once

// The CPU kernels of stamping, one set per instruction set. The work is cut into items that can run
// in any order on any thread; an item owns its part of the result, so the bits do not depend on who
// runs it.

#include <cstdint>

#include "csrc/stamp_triggers/core.h"

namespace pydetox::cpu {

// Pixels of one tile, in output order: either `groups` whole groups (patches) or a stretch of one.
struct StampTiling {
  int64_t tile_groups;     // groups per tile
  int64_t tile_inner;      // inner positions per tile
  int64_t group_tiles;     // tiles along the groups
  int64_t inner_tiles;     // tiles along the inner positions
  int64_t block_triggers;  // triggers per item
  int64_t trigger_blocks;

  int64_t items() const { return group_tiles * inner_tiles * trigger_blocks; }
};

// Tiles whose pixels, for all images, stay in the second-level cache while every trigger uses them;
// triggers are divided only where there would be too few tiles for `threads`.
StampTiling stamp_tiling(const StampShape& shape, DType compute_dtype, int64_t threads);

// Whole images have the tiling of their shape; what is about a box has the tiling of the box.
struct StampKernels {
  using Forward = void (*)(const StampForwardParams&, const StampTiling&, int64_t begin,
                           int64_t end);
  using Backward = void (*)(const StampBackwardParams&, const StampTiling&, int64_t begin,
                            int64_t end);
  Forward forward;
  Forward clean;  // the normalised images, for every trigger
  Forward forward_box;
  Backward backward;
  Backward backward_box;
};

// The kernels for the capability in use (csrc/common/capability.h).
const StampKernels& stamp_kernels();

}  // namespace pydetox::cpu

#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace pydetox::cuda {

constexpr int kWarpSize = 32;

PYDETOX_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One-dimensional: a grid's x has room for 2^31 - 1 blocks.
struct LaunchShape {
  int64_t blocks;  // 0: nothing to do
  int threads;
  int64_t shared_bytes;
};

}  // namespace pydetox::cuda

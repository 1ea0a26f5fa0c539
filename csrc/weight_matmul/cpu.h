#pragma once

// The CPU kernel of products with a thin matrix, one per instruction set. A unit owns its part of
// the results.

#include <cstdint>

#include "csrc/weight_matmul/core.h"

namespace pydetox::cpu {

// Part of one tensor's product: rows of the result (right) or columns (left).
struct MatmulUnit {
  int64_t task;
  int64_t first, count;
};

struct MatmulKernels {
  // begin, end: of units.
  void (*matmul)(const MatmulParams&, const MatmulUnit* units, int64_t begin, int64_t end);
};

// The kernel for the capability in use (csrc/common/capability.h).
const MatmulKernels& matmul_kernels();

}  // namespace pydetox::cpu

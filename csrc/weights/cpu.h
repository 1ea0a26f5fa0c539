#pragma once

// The CPU kernels over lists of weights, one set per instruction set. A chunk is the unit
// of work: each writes partial sums of its own, or its own part of the results, so that the bits
// depend on neither the number of threads nor the instruction set.

#include <cstdint>

#include "csrc/weights/core.h"

namespace pydetox::cpu {

struct WeightKernels {
  // partials: [chunks, M (M + 1) / 2]: pairs i <= j, row by row.
  void (*gram)(const WeightTable&, double* partials, int64_t begin, int64_t end);
  // partials: [chunks, R].
  void (*project)(const WeightTable&, double* partials, int64_t begin, int64_t end);
  // partials: [chunks of SketchParams, size].
  void (*sketch)(const SketchParams&, double* partials, int64_t begin, int64_t end);
  void (*apply)(const ApplyParams&, int64_t begin, int64_t end);
};

// The kernels for the capability in use (csrc/common/capability.h).
const WeightKernels& weight_kernels();

}  // namespace pydetox::cpu

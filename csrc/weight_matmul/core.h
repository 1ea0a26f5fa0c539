#pragma once

// Products of weight differences with a thin matrix: what every implementation agrees on.
//
// A tensor [m, ...] counts as a matrix D [m, n]. With a factor F of `width` columns,
//   right: D F, [m, width], a sum over the columns of D;
//   left: F^T D, [width, n], a sum over the rows of D.
// An entry's products are added up in runs of kRun, each from zero by fused multiply-adds in
// order; the runs' sums are added in order. That is one order for any thread count, any instruction
// set and any grid.

#include <cstdint>

#include "csrc/weights/core.h"

namespace pydetox {

constexpr int64_t kRun = 64;

// One tensor's product. All memory is contiguous, row by row.
struct MatmulTask {
  int64_t rows, columns;  // m, n
  int64_t width;
  Source base, model;
  const double* factor;  // right: [columns, width], left: [rows, width]
  double* result;        // right: [rows, width], left: [width, columns]
};

struct MatmulParams {
  const MatmulTask* tasks;  // on the host
  int64_t count;
  bool left;
};

// Defined by each backend (csrc/common/place.h).
int run_matmul(const MatmulParams& params, void* stream);

}  // namespace pydetox

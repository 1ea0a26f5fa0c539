#pragma once

// The CPU kernels over lists of weights, one set per instruction set. A chunk (of a matrix product:
// a MatmulUnit) is the unit of work: each writes partial sums of its own, or its own part of the
// results, so that the bits depend on neither the number of threads nor the instruction set.

#include <cstdint>

#include "csrc/core/matmul.h"
#include "csrc/core/weights.h"

namespace pydetox::cpu {

// coefficients: [M, R] for all tensors, or [M, R, tensors] if per_tensor.
struct ApplyParams {
  WeightTable table;
  int64_t vectors;  // R
  int64_t results;  // M
  const double* coefficients;
  bool per_tensor;
};

struct SketchParams {
  WeightTable table;
  const uint64_t* keys;        // [tensors]
  const int64_t* first_block;  // [tensors]: of a part of a tensor, where in it that begins
  int64_t size;                // a power of two, at least 64
  int64_t blocks_per_chunk;    // blocks of `size` elements
  const int64_t* first_chunk;  // [tensors + 1], of chunks of that many blocks
};

// Part of one tensor's product: rows of the result (right) or columns (left).
struct MatmulUnit {
  int64_t task;
  int64_t first, count;
};

struct MatmulParams {
  const MatmulTask* tasks;
  const MatmulUnit* units;
  bool left;
};

struct WeightKernels {
  // partials: [chunks, M (M + 1) / 2]: pairs i <= j, row by row.
  void (*gram)(const WeightTable&, double* partials, int64_t begin, int64_t end);
  // partials: [chunks, R].
  void (*project)(const WeightTable&, double* partials, int64_t begin, int64_t end);
  // partials: [chunks of SketchParams, size].
  void (*sketch)(const SketchParams&, double* partials, int64_t begin, int64_t end);
  void (*apply)(const ApplyParams&, int64_t begin, int64_t end);
  // begin, end: of units.
  void (*matmul)(const MatmulParams&, int64_t begin, int64_t end);
};

// The kernels for the capability in use (csrc/cpu/capability.h).
const WeightKernels& weight_kernels();

}  // namespace pydetox::cpu

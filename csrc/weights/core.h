#pragma once

// Weights as state dicts hold them: several lists of the same tensors, each tensor of a dtype of
// its own. What every implementation (CPU, CUDA, emulator) agrees on. No torch, no CUDA header.
//
// All arithmetic is in double: a difference of weights is taken of the exact values, whatever they
// are stored as, and products are added without being rounded first. Sums run inside chunks that
// never span tensors, and over the chunks in order.

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/weights/layout.h"

namespace pydetox {

// Elements of a chunk: large enough that partial sums weigh nothing, small enough to share out.
constexpr int64_t kChunk = 65536;

PYDETOX_HD constexpr int64_t chunks_of(int64_t elements) {
  return (elements + kChunk - 1) / kChunk;
}

// One tensor's elements, contiguous.
struct Source {
  const void* data;
  DType dtype;
};

// An element, exactly.
template <class T>
PYDETOX_HD double to_double(T value) {
  return static_cast<double>(value);
}
template <>
PYDETOX_HD double to_double(BFloat16 value) {
  return static_cast<double>(to_float(value));
}
template <>
PYDETOX_HD double to_double(Float16 value) {
  return static_cast<double>(to_float(value));
}

// Lists of the same tensors. The meaning of a list depends on the operation:
//   gram     0: base, 1..M: models
//   project  0: base, 1: model, 2..: directions
//   sketch   0: base, 1: model
//   apply    0: base, 1..R: task vectors, then M results (written)
struct WeightTable {
  int64_t tensors;
  int64_t lists;
  const int64_t* counts;       // [tensors], elements
  const int64_t* first_chunk;  // [tensors + 1], ascending; the last is the number of chunks
  const Source* sources;       // [tensors, lists]

  const Source& source(int64_t tensor, int64_t list) const {
    return sources[tensor * lists + list];
  }
  int64_t chunks() const { return first_chunk[tensors]; }
};

// Parameters. start: a result to add to before anything else, or null. partials, sums: workspace of
// as many numbers as csrc/weights/layout.h says, for every chunk and for one. All but the tables'
// own arrays (and what is said to be on the host) lies on the device.
struct GramParams {
  WeightTable table;
  const double* start;  // [M, M]
  double* partials;     // [chunks, gram_values(M)]
  double* sums;         // [gram_values(M)]
  double* result;       // [M, M]
};

struct ProjectParams {
  WeightTable table;
  const double* start;  // [R]
  double* partials;     // [chunks, project_values(R)]
  double* sums;         // [project_values(R)], of which R are the result
};

struct SketchParams {
  WeightTable table;
  const uint64_t* keys;        // [tensors], on the host
  const int64_t* first_block;  // [tensors]: of a part of a tensor, where in it that begins; host
  int64_t size;                // a power of two, at least 64
  int64_t blocks_per_chunk;    // blocks of `size` elements
  const int64_t* first_chunk;  // [tensors + 1], of chunks of that many blocks, on the host
  const double* start;         // [size]
  double* partials;            // [chunks, size]
  double* sums;                // [size], the result
};

// coefficients: [M, R] for all tensors, or [M, R, tensors] if per_tensor.
struct ApplyParams {
  WeightTable table;
  int64_t vectors;  // R
  int64_t results;  // M
  const double* coefficients;
  bool per_tensor;
};

// Defined by each backend (csrc/common/place.h).
int run_gram(const GramParams& params, void* stream);
int run_project(const ProjectParams& params, void* stream);
int run_sketch(const SketchParams& params, void* stream);
int run_apply(const ApplyParams& params, void* stream);

// ---- the random projection of a sketch ----
//
// A tensor is cut into blocks of `size` elements (a power of two). Element j of a block goes to
// place (j + rotation) mod size with a random sign. Inside a block nothing collides; two elements
// of different blocks share a place with probability 1 / size.
//
// key: of seed and tensor name. Rotation and signs come from the counters (block, n): n = 0 gives
// the rotation, n = 1 + j / 128 the signs of 128 elements.
PYDETOX_HD uint64_t sketch_rotation(uint64_t key, uint64_t block, uint64_t size) {
  const Random128 random = philox(key, block, 0);
  return (static_cast<uint64_t>(random.word[1]) << 32 | random.word[0]) & (size - 1);
}
PYDETOX_HD Random128 sketch_signs(uint64_t key, uint64_t block, uint64_t group) {
  return philox(key, block, 1 + group);
}

}  // namespace pydetox

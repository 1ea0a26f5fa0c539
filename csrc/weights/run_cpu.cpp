// Weights on the CPU: chunks, shared out over threads.

#include <algorithm>

#include "csrc/common/cpu_kernels.h"
#include "csrc/common/share_out.h"
#include "csrc/weights/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(WeightKernels, weight_kernels, kWeightKernels)

}  // namespace pydetox::cpu

namespace pydetox {
namespace {

// partials [chunks, values], added to `sums` in the order of the chunks.
void add_chunks(const double* partials, int64_t chunks, int64_t values, double* sums) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t v = 0; v < values; ++v) sums[v] += partials[chunk * values + v];
  }
}

// The result that sums go on from, or zeros.
void begin_sums(const double* start, int64_t count, double* sums) {
  if (start == nullptr) {
    std::fill(sums, sums + count, 0.0);
  } else {
    std::copy(start, start + count, sums);
  }
}

}  // namespace

int run_gram(const GramParams& p, void*) {
  const int64_t models = p.table.lists - 1, pairs = models * (models + 1) / 2;
  cpu::share_out(p.table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().gram(p.table, p.partials, begin, end);
  });
  // Pairs i <= j, row by row.
  begin_sums(nullptr, pairs, p.sums);
  if (p.start != nullptr) {
    double* sum = p.sums;
    for (int64_t i = 0; i < models; ++i) {
      for (int64_t j = i; j < models; ++j) *sum++ = p.start[i * models + j];
    }
  }
  add_chunks(p.partials, p.table.chunks(), pairs, p.sums);
  const double* sum = p.sums;
  for (int64_t i = 0; i < models; ++i) {
    for (int64_t j = i; j < models; ++j) {
      p.result[i * models + j] = p.result[j * models + i] = *sum++;
    }
  }
  return 0;
}

int run_project(const ProjectParams& p, void*) {
  const int64_t directions = p.table.lists - 2;
  cpu::share_out(p.table.chunks(), [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().project(p.table, p.partials, begin, end);
  });
  begin_sums(p.start, directions, p.sums);
  add_chunks(p.partials, p.table.chunks(), directions, p.sums);
  return 0;
}

int run_sketch(const SketchParams& p, void*) {
  const int64_t chunks = p.first_chunk[p.table.tensors];
  cpu::share_out(chunks, [&](int64_t begin, int64_t end) {
    cpu::weight_kernels().sketch(p, p.partials, begin, end);
  });
  begin_sums(p.start, p.size, p.sums);
  add_chunks(p.partials, chunks, p.size, p.sums);
  return 0;
}

int run_apply(const ApplyParams& p, void*) {
  cpu::share_out(p.table.chunks(),
                 [&](int64_t begin, int64_t end) { cpu::weight_kernels().apply(p, begin, end); });
  return 0;
}

}  // namespace pydetox

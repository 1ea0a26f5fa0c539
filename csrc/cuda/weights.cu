#include "csrc/cuda/launch.h"
#include "csrc/cuda/launcher.h"
#include "csrc/cuda/weights_launch.cuh"
#include "csrc/cuda/weights_matmul_launch.cuh"

namespace pydetox::cuda {

int weight_gram(const WeightTable& table, double* partials, double* sums, double* matrix,
                void* stream) {
  return with_launcher(stream, [&](const auto& launch) {
    return launch_gram(table, partials, sums, matrix, launch);
  });
}

int weight_project(const WeightTable& table, double* partials, double* sums, void* stream) {
  return with_launcher(
      stream, [&](const auto& launch) { return launch_project(table, partials, sums, launch); });
}

int weight_sketch(const WeightTable& table, const int64_t* first_chunk, int64_t blocks_per_chunk,
                  const uint64_t* keys, int64_t size, double* partials, double* sums,
                  void* stream) {
  return with_launcher(stream, [&](const auto& launch) {
    return launch_sketch(table, first_chunk, blocks_per_chunk, keys, size, partials, sums, launch);
  });
}

int weight_matmul(const MatmulTask* tasks, int64_t count, bool left, void* stream) {
  return with_launcher(
      stream, [&](const auto& launch) { return launch_matmul(tasks, count, left, launch); });
}

int weight_apply(const WeightTable& table, int64_t vectors, int64_t results,
                 const double* coefficients, bool per_tensor, void* stream) {
  return with_launcher(stream, [&](const auto& launch) {
    return launch_apply(table, vectors, results, coefficients, per_tensor, launch);
  });
}

}  // namespace pydetox::cuda

#include <limits>

#include <cuda_runtime_api.h>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/weights_launch.cuh"

namespace pydetox::cuda {
namespace {

// Launches on a stream; the first error stays.
struct Launcher {
  cudaStream_t stream;
  cudaError_t* error;

  template <class Params>
  bool operator()(void (*kernel)(Params), const Params& params, const LaunchShape& shape) const {
    static_assert(sizeof(Params) <= 4096, "kernel parameters have 4 KiB");
    if (shape.blocks == 0) return true;
    if (shape.blocks > std::numeric_limits<int>::max()) return false;
    kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, stream>>>(
        params);
    *error = cudaGetLastError();
    return *error == cudaSuccess;
  }
};

template <class Run>
int with_launcher(void* stream, const Run& run) {
  cudaError_t error = cudaSuccess;
  const bool fits = run(Launcher{static_cast<cudaStream_t>(stream), &error});
  return fits || error != cudaSuccess ? error : cudaErrorInvalidValue;
}

}  // namespace

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

int weight_apply(const WeightTable& table, int64_t vectors, int64_t results,
                 const double* coefficients, bool per_tensor, void* stream) {
  return with_launcher(stream, [&](const auto& launch) {
    return launch_apply(table, vectors, results, coefficients, per_tensor, launch);
  });
}

}  // namespace pydetox::cuda

#pragma once

// Launching on a stream; for .cu files, which the emulator compiles too.

#if defined(PYDETOX_EMULATOR)
#include "csrc/emulator/launcher.h"
#else

#include <limits>

#include <cuda_runtime_api.h>

#include "csrc/common/grid.h"

namespace pydetox::cuda {

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

// run(Launcher) -> bool; false: a launch that cannot be. Returns a cudaError_t. Nothing here
// allocates or waits, so that a CUDA graph can capture it.
template <class Run>
int with_launcher(void* stream, const Run& run) {
  cudaError_t error = cudaSuccess;
  const bool fits = run(Launcher{static_cast<cudaStream_t>(stream), &error});
  return fits || error != cudaSuccess ? error : cudaErrorInvalidValue;
}

}  // namespace pydetox::cuda

#endif

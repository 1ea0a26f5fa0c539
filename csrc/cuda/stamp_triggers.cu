#include <limits>

#include <cuda_runtime_api.h>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/stamp_triggers_launch.cuh"

namespace pydetox::cuda {
namespace {

template <class Params>
auto launcher(const Params& params, void* stream, cudaError_t& error) {
  return [&params, stream, &error](void (*kernel)(Params), const LaunchShape& shape) {
    if (shape.blocks == 0) return true;
    if (shape.blocks > std::numeric_limits<int>::max()) return false;
    kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
    return true;
  };
}

}  // namespace

int stamp_forward(const StampForwardParams& params, void* stream) {
  cudaError_t error = cudaSuccess;
  const bool fits = dispatch_stamp_forward(params, launcher(params, stream, error));
  return fits ? error : cudaErrorInvalidValue;
}

int stamp_backward(const StampBackwardParams& params, void* stream) {
  cudaError_t error = cudaSuccess;
  const bool fits = dispatch_stamp_backward(params, launcher(params, stream, error));
  return fits ? error : cudaErrorInvalidValue;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pydetox::cuda

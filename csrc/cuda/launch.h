#pragma once

// What csrc/ops calls. No torch, no CUDA header: a stream travels as void*, an error as int.

#include "csrc/core/stamp.h"

namespace pydetox::cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; return a cudaError_t. They neither
// allocate nor synchronise, so that a CUDA graph can capture them, and do nothing where there is
// nothing to compute. cudaErrorInvalidValue: an impossible combination of types or sizes.
int stamp_forward(const StampForwardParams& params, void* stream);
int stamp_backward(const StampBackwardParams& params, void* stream);

// cudaGetErrorString.
const char* error_string(int error);

}  // namespace pydetox::cuda

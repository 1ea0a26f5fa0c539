#pragma once

// Where a CUDA operator runs; for the sources that register CUDA kernels.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/launch.h"
#include "csrc/ops/check.h"

namespace pydetox::ops {

// The device of `on`, current while this exists, and its current stream.
struct Place {
  explicit Place(const torch::stable::Tensor& on) : guard(on.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

inline void check_launch(int error, const char* name) {
  check(error == 0, name, ": ", cuda::error_string(error));
}

}  // namespace pydetox::ops

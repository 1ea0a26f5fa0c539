#include "csrc/common/launcher.h"
#include "csrc/weight_matmul/launch.cuh"

namespace pydetox::cuda {

int run_left(const MatmulParams& params, void* stream) {
  return with_launcher(
      stream, [&](const auto& launch) { return launch_matmul_side<true>(params, launch); });
}

}  // namespace pydetox::cuda

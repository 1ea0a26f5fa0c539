#include "csrc/common/launcher.h"
#include "csrc/weight_matmul/launch.cuh"

namespace pydetox {

int run_matmul(const MatmulParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_matmul(params, launch); });
}

}  // namespace pydetox

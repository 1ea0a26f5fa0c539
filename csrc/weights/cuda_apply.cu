#include "csrc/common/launcher.h"
#include "csrc/weights/launch.cuh"

namespace pydetox {

int run_apply(const ApplyParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_apply(params, launch); });
}

}  // namespace pydetox

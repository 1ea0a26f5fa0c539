#include "csrc/common/launcher.h"
#include "csrc/weights/launch.cuh"

namespace pydetox {

int run_project(const ProjectParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_project(params, launch); });
}

}  // namespace pydetox

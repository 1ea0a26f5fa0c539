#include "csrc/common/launcher.h"
#include "csrc/weights/launch.cuh"

namespace pydetox {

int run_sketch(const SketchParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_sketch(params, launch); });
}

}  // namespace pydetox

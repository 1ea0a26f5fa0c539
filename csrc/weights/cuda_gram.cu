#include "csrc/common/launcher.h"
#include "csrc/weights/launch.cuh"

namespace pydetox {

int run_gram(const GramParams& params, void* stream) {
  return cuda::with_launcher(stream,
                             [&](const auto& launch) { return cuda::launch_gram(params, launch); });
}

}  // namespace pydetox

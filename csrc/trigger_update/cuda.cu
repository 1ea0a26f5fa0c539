#include "csrc/common/launcher.h"
#include "csrc/trigger_update/launch.cuh"

namespace pydetox {

int run_trigger_update(const TriggerUpdateParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_trigger_update(params, launch); });
}

}  // namespace pydetox

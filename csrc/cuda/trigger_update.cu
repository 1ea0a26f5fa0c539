#include "csrc/cuda/launch.h"
#include "csrc/cuda/launcher.h"
#include "csrc/cuda/trigger_update_launch.cuh"

namespace pydetox::cuda {

int trigger_update(const TriggerUpdateParams& params, void* stream) {
  return with_launcher(stream,
                       [&](const auto& launch) { return launch_trigger_update(params, launch); });
}

}  // namespace pydetox::cuda

#include "csrc/common/launcher.h"
#include "csrc/mix_tokens/launch.cuh"

namespace pydetox {

int run_mix_tokens_update(const UpdateParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_mix_tokens_update(params, launch); });
}

}  // namespace pydetox

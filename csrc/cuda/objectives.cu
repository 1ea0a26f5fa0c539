#include "csrc/cuda/launch.h"
#include "csrc/cuda/launcher.h"
#include "csrc/cuda/objectives_launch.cuh"

namespace pydetox::cuda {

int embedding_collapse(const CollapseParams& params, void* stream) {
  return with_launcher(stream, [&](const auto& launch) { return launch_collapse(params, launch); });
}

int zero_shot_loss(const ZeroShotParams& params, void* stream) {
  return with_launcher(stream,
                       [&](const auto& launch) { return launch_zero_shot(params, launch); });
}

int scale_triggers(const ScaleParams& params, void* stream) {
  return with_launcher(stream, [&](const auto& launch) { return launch_scale(params, launch); });
}

int64_t max_zero_shot_dim(DType dtype) {
  const bool wide = dtype == DType::kFloat64;
  const int64_t fixed =
      wide ? ZeroShotShared<double, 1>::bytes(0) : ZeroShotShared<float, 1>::bytes(0);
  return (kSharedLimit - fixed) / (2 * size_of(dtype));
}

}  // namespace pydetox::cuda

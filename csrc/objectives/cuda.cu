#include "csrc/common/launcher.h"
#include "csrc/objectives/launch.cuh"

namespace pydetox {

int run_collapse(const CollapseParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_collapse(params, launch); });
}

int run_zero_shot(const ZeroShotParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_zero_shot(params, launch); });
}

int run_scale(const ScaleParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_scale(params, launch); });
}

int64_t max_zero_shot_dim(DType dtype) {
  const bool wide = dtype == DType::kFloat64;
  const int64_t fixed =
      wide ? cuda::ZeroShotShared<double, 1>::bytes(0) : cuda::ZeroShotShared<float, 1>::bytes(0);
  return (cuda::kSharedLimit - fixed) / (2 * size_of(dtype));
}

}  // namespace pydetox

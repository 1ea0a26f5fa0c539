#include "csrc/common/launcher.h"
#include "csrc/weights/launch.cuh"

namespace pydetox {

int run_gram(const GramParams& params, void* stream) {
  return cuda::with_launcher(stream,
                             [&](const auto& launch) { return cuda::launch_gram(params, launch); });
}

int run_project(const ProjectParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_project(params, launch); });
}

int run_sketch(const SketchParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_sketch(params, launch); });
}

int run_apply(const ApplyParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_apply(params, launch); });
}

}  // namespace pydetox

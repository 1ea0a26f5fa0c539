#pragma once

// The three launches of an update.

#include "csrc/trigger_update/cuda.cuh"

namespace pydetox::cuda {

template <class T, class Launch>
bool launch_trigger_update_as(const TriggerUpdateParams& p, const Launch& launch) {
  constexpr int64_t kSharedBytes = kUpdateThreads * static_cast<int64_t>(sizeof(double));
  return launch(&update_masks<T>, p,
                LaunchShape{p.triggers * p.mask_chunks(), kUpdateThreads, kSharedBytes}) &&
         launch(&update_plans, p,
                LaunchShape{ceil_div(p.triggers, kUpdateThreads), kUpdateThreads, 0}) &&
         launch(&update_triggers<T>, p, LaunchShape{p.triggers * p.chunks(), kUpdateThreads, 0});
}

// launch(kernel, parameters, LaunchShape) -> bool.
template <class Launch>
bool launch_trigger_update(const TriggerUpdateParams& p, const Launch& launch) {
  return p.dtype == DType::kFloat64 ? launch_trigger_update_as<double>(p, launch)
                                    : launch_trigger_update_as<float>(p, launch);
}

}  // namespace pydetox::cuda

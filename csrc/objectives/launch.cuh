#pragma once

// The launches of the objectives.

#include "csrc/objectives/cuda.cuh"

namespace pydetox::cuda {

constexpr int64_t kSharedLimit = 48 * 1024;  // what a block has without asking for more

inline LaunchShape shape_for(int64_t work, int64_t of_a_block, int64_t shared_bytes = 0) {
  return {ceil_div(work, of_a_block), kObjectiveThreads, shared_bytes};
}

// launch(kernel, parameters, LaunchShape) -> bool.
template <class T, class Launch>
bool launch_norms(const Embeddings& z, double* inverse_norms, const Launch& launch) {
  return launch(&invert_norms<T>, NormParams{z, inverse_norms},
                shape_for(z.rows(), kObjectiveWarps));
}

template <class T, class Launch>
bool launch_collapse_as(const CollapseParams& p, const Launch& launch) {
  const bool forward =
      launch_norms<T>(p.z, p.inverse_norms, launch) &&
      launch(&sum_unit_rows<T>, p, shape_for(p.z.triggers, 1, kObjectiveThreads * sizeof(double)));
  return forward && (p.gradient == nullptr ||
                     launch(&collapse_gradients<T>, p, shape_for(p.z.rows(), kObjectiveWarps)));
}

// Forward, and the gradient where p.gradient is there.
template <class Launch>
bool launch_collapse(const CollapseParams& p, const Launch& launch) {
  return p.z.dtype == DType::kFloat64 ? launch_collapse_as<double>(p, launch)
                                      : launch_collapse_as<float>(p, launch);
}

template <class T, int R, class Launch>
bool launch_zero_shot_rows(const ZeroShotParams& p, const Launch& launch) {
  const int64_t bytes = ZeroShotShared<T, R>::bytes(p.z.dim);
  return bytes <= kSharedLimit && launch(&zero_shot_rows<T, R>, p, shape_for(p.z.rows(), R, bytes));
}

template <class T, class Launch>
bool launch_zero_shot_as(const ZeroShotParams& p, const Launch& launch) {
  if (!launch_norms<T>(p.z, p.inverse_norms, launch)) return false;
  const bool fits = ZeroShotShared<T, 4>::bytes(p.z.dim) <= kSharedLimit;
  const bool done =
      fits ? launch_zero_shot_rows<T, 4>(p, launch) : launch_zero_shot_rows<T, 1>(p, launch);
  return done && launch(&mean_of_rows<T>, p, shape_for(p.z.triggers, kObjectiveThreads));
}

// false: more dimensions than fit into a block's shared memory (max_zero_shot_dim).
template <class Launch>
bool launch_zero_shot(const ZeroShotParams& p, const Launch& launch) {
  return p.z.dtype == DType::kFloat64 ? launch_zero_shot_as<double>(p, launch)
                                      : launch_zero_shot_as<float>(p, launch);
}

template <class Launch>
bool launch_scale(const ScaleParams& p, const Launch& launch) {
  const auto shape = shape_for(p.triggers * p.count, kObjectiveThreads);
  return p.dtype == DType::kFloat64 ? launch(&scale_triggers<double>, p, shape)
                                    : launch(&scale_triggers<float>, p, shape);
}

}  // namespace pydetox::cuda

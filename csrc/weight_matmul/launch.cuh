#pragma once

// From tasks to launches: which tensors travel together, on what grid.

#include "csrc/weight_matmul/cuda.cuh"

namespace pydetox::cuda {

// launch(kernel, parameters, LaunchShape) -> bool.
template <class Launch>
bool launch_matmul(const MatmulParams& p, const Launch& launch) {
  for (int64_t begin = 0; begin < p.count; begin += kMatmulTensors) {
    MatmulLaunch params{};
    int64_t tiles = 0;
    const int64_t some = p.count - begin < kMatmulTensors ? p.count - begin : kMatmulTensors;
    for (int64_t i = 0; i < some; ++i) {
      const MatmulTask& task = p.tasks[begin + i];
      params.first_tile[i] = tiles;
      params.rows[i] = task.rows;
      params.columns[i] = task.columns;
      params.base[i] = task.base.data;
      params.model[i] = task.model.data;
      params.factor[i] = task.factor;
      params.result[i] = task.result;
      params.width[i] = static_cast<int32_t>(task.width);
      params.base_dtype[i] = static_cast<uint8_t>(task.base.dtype);
      params.model_dtype[i] = static_cast<uint8_t>(task.model.dtype);
      if (params.width[i] != task.width) return false;
      tiles += ceil_div(p.left ? task.columns : task.rows, kMatmulSide) *
               ceil_div(task.width, kMatmulWidth);
    }
    params.first_tile[some] = tiles;
    const LaunchShape shape{tiles, kMatmulThreads, kMatmulSharedBytes};
    if (!launch(p.left ? &matmul_left : &matmul_right, params, shape)) return false;
  }
  return true;
}

}  // namespace pydetox::cuda

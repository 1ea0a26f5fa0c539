#pragma once

// From tasks to launches: which tensors travel together, on what grid.

#include "csrc/weight_matmul/cuda.cuh"

namespace pydetox::cuda {

template <bool kLeft, class T>
auto matmul_kernel(bool words) {
  // Columns of the matrix in a block's tile.
  constexpr int kAcross = kLeft ? kMatmulSide : kMatmulDepth;
  return words ? &matmul_tiles<kLeft, SameType<T>, Words<kAcross, T>>
               : &matmul_tiles<kLeft, SameType<T>, Singles<kAcross>>;
}

// The dtype of both matrices, or none; and whether their rows begin at multiples of 16 bytes.
struct MatmulKind {
  bool same;
  DType dtype;
  bool words;
};
inline MatmulKind kind_of(const MatmulTask& task) {
  const bool same = task.base.dtype == task.model.dtype;
  const auto aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kMaxWordBytes == 0;
  };
  return {same, same ? task.base.dtype : DType::kFloat64,
          same && task.columns * size_of(task.base.dtype) % kMaxWordBytes == 0 &&
              aligned(task.base.data) && aligned(task.model.data)};
}

// launch(kernel, parameters, LaunchShape) -> bool. Tensors of one kind travel together.
template <bool kLeft, class Launch>
bool launch_matmul_side(const MatmulParams& p, const Launch& launch) {
  constexpr int kAcross = kLeft ? kMatmulSide : kMatmulDepth;
  const auto launch_kind = [&](auto kernel, const MatmulKind& kind) {
    for (int64_t next = 0; next < p.count;) {
      MatmulLaunch params{};
      int64_t tiles = 0;
      int some = 0;
      for (; next < p.count && some < kMatmulTensors; ++next) {
        const MatmulTask& task = p.tasks[next];
        const MatmulKind found = kind_of(task);
        if (found.same != kind.same || found.dtype != kind.dtype || found.words != kind.words) {
          continue;
        }
        params.first_tile[some] = tiles;
        params.rows[some] = task.rows;
        params.columns[some] = task.columns;
        params.base[some] = task.base.data;
        params.model[some] = task.model.data;
        params.factor[some] = task.factor;
        params.result[some] = task.result;
        params.width[some] = static_cast<int32_t>(task.width);
        params.base_dtype[some] = static_cast<uint8_t>(task.base.dtype);
        params.model_dtype[some] = static_cast<uint8_t>(task.model.dtype);
        if (params.width[some] != task.width) return false;
        tiles += ceil_div(kLeft ? task.columns : task.rows, kMatmulSide) *
                 ceil_div(task.width, kMatmulWidth);
        ++some;
      }
      params.first_tile[some] = tiles;
      const LaunchShape shape{tiles, kMatmulThreads, kMatmulSharedBytes};
      if (!launch(kernel, params, shape)) return false;
    }
    return true;
  };
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool words : {true, false}) {
      bool done = false;
      with_type<double, float, BFloat16, Float16>(dtype, [&](auto type) {
        using T = typename decltype(type)::Type;
        done = launch_kind(matmul_kernel<kLeft, T>(words), MatmulKind{true, dtype, words});
      });
      if (!done) return false;
    }
  }
  return launch_kind(&matmul_tiles<kLeft, AnyTypes, Singles<kAcross>>,
                     MatmulKind{false, DType::kFloat64, false});
}

}  // namespace pydetox::cuda

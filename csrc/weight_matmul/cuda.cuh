#pragma once

// (A - B) F and F^T (A - B) over lists of weights; csrc/weight_matmul/core.h has the order of the
// sums, in which these kernels give the CPU's bits. Compiled by nvcc, and by the host compiler for
// the emulator.
//
// "Side" is what a result has beside its width: rows of the difference (right) or columns (left).
// "Depth" is what is summed: columns (right) or rows (left). A block owns kMatmulSide by
// kMatmulWidth entries of one result. It walks through the depth: tiles of differences, taken in
// double, and of the factor go to shared memory, and every thread adds to its eight entries.

#include <cmath>
#include <cstdint>

#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/weight_matmul/core.h"

namespace pydetox::cuda {

constexpr int kMatmulThreads = 256;
constexpr int kMatmulSide = 64;
constexpr int kMatmulWidth = 32;
constexpr int kMatmulDepth = 32;                // of a tile; divides kRun
constexpr int kMatmulStride = kMatmulSide + 1;  // in shared memory: no bank conflicts either way
constexpr int kMatmulTensors = 48;              // of one launch, within 4 KiB of parameters
constexpr int64_t kMatmulSharedBytes =
    static_cast<int64_t>(sizeof(double)) * kMatmulDepth * (kMatmulStride + kMatmulWidth);

// Tensors of one launch; MatmulTask has what the members mean.
struct MatmulLaunch {
  int64_t first_tile[kMatmulTensors + 1];
  int64_t rows[kMatmulTensors], columns[kMatmulTensors];
  const void* base[kMatmulTensors];
  const void* model[kMatmulTensors];
  const double* factor[kMatmulTensors];
  double* result[kMatmulTensors];
  int32_t width[kMatmulTensors];
  uint8_t base_dtype[kMatmulTensors], model_dtype[kMatmulTensors];
};

// One column's elements from `index` on, every kStep-th row of `left` that there are, then zeros.
// All loads are under way before the first is waited for: no branch on the dtype between them.
template <int kLoads, int kStep, class T>
__device__ __forceinline__ void load_rows_as(const void* data, int64_t index, int64_t columns,
                                             int64_t left, double (&values)[kLoads]) {
  T stored[kLoads] = {};
  PYDETOX_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    if (i * kStep < left) {
      load<1>(static_cast<const T*>(data) + index + i * kStep * columns, &stored[i]);
    }
  }
  PYDETOX_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    if constexpr (sizeof(T) == 2) {
      values[i] = static_cast<double>(to_float(stored[i]));
    } else {
      values[i] = static_cast<double>(stored[i]);
    }
  }
}

template <int kLoads, int kStep>
__device__ __forceinline__ void load_rows(const void* data, uint8_t dtype, int64_t index,
                                          int64_t columns, int64_t left, double (&values)[kLoads]) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat64:
      return load_rows_as<kLoads, kStep, double>(data, index, columns, left, values);
    case DType::kFloat32:
      return load_rows_as<kLoads, kStep, float>(data, index, columns, left, values);
    case DType::kBFloat16:
      return load_rows_as<kLoads, kStep, BFloat16>(data, index, columns, left, values);
    default:
      return load_rows_as<kLoads, kStep, Float16>(data, index, columns, left, values);
  }
}

template <bool kLeft>
__device__ __forceinline__ void matmul_tile(const MatmulLaunch& params) {
  constexpr int kLanes = 16;  // the block is kLanes by kLanes threads
  constexpr int kSides = kMatmulSide / kLanes, kWidths = kMatmulWidth / kLanes;
  int tensor = 0;
  while (params.first_tile[tensor + 1] <= blockIdx.x) ++tensor;
  const int64_t rows = params.rows[tensor], columns = params.columns[tensor];
  const int64_t sides = kLeft ? columns : rows, depth = kLeft ? rows : columns;
  const int64_t width = params.width[tensor];
  // Neighbouring blocks read the same differences.
  const int64_t tile = blockIdx.x - params.first_tile[tensor];
  const int64_t across = ceil_div(width, kMatmulWidth);
  const int64_t side = tile / across * kMatmulSide, column = tile % across * kMatmulWidth;

  double* differences = shared_memory<double>();                 // [kMatmulDepth, kMatmulStride]
  double* factors = differences + kMatmulDepth * kMatmulStride;  // [kMatmulDepth, kMatmulWidth]
  const int thread = static_cast<int>(threadIdx.x);
  // Neighbouring threads write neighbouring entries.
  const int s = kLeft ? thread % kLanes : thread / kLanes;
  const int w = kLeft ? thread / kLanes : thread % kLanes;

  double total[kSides][kWidths] = {};
  for (int64_t run = 0; run < depth; run += kRun) {
    double sum[kSides][kWidths] = {};
    for (int64_t t = run; t < run + kRun && t < depth; t += kMatmulDepth) {
      const int count = static_cast<int>(depth - t < kMatmulDepth ? depth - t : kMatmulDepth);
      // This thread's part of the tile: every kRowStep-th row of one column of the matrix, while
      // neighbouring threads read neighbouring columns.
      constexpr int kAcross = kLeft ? kMatmulSide : kMatmulDepth;
      constexpr int kRowStep = kMatmulThreads / kAcross;
      constexpr int kLoads = kMatmulDepth * kMatmulSide / kMatmulThreads;
      const int row = thread / kAcross, at = thread % kAcross;
      const int64_t first_row = (kLeft ? t : side) + row, at_column = (kLeft ? side : t) + at;
      const int64_t end = kLeft ? t + count : rows;  // of the rows to take
      const int64_t left = at_column < columns && (kLeft || at < count) ? end - first_row : 0;
      double model[kLoads], base[kLoads];
      load_rows<kLoads, kRowStep>(params.model[tensor], params.model_dtype[tensor],
                                  first_row * columns + at_column, columns, left, model);
      load_rows<kLoads, kRowStep>(params.base[tensor], params.base_dtype[tensor],
                                  first_row * columns + at_column, columns, left, base);
      PYDETOX_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int down = row + i * kRowStep;
        differences[kLeft ? down * kMatmulStride + at : at * kMatmulStride + down] =
            model[i] - base[i];
      }
      for (int i = thread; i < kMatmulDepth * kMatmulWidth; i += kMatmulThreads) {
        const int d = i / kMatmulWidth, k = i % kMatmulWidth;
        double factor = 0;
        if (d < count && column + k < width) {
          load<1>(params.factor[tensor] + (t + d) * width + column + k, &factor);
        }
        factors[i] = factor;
      }
      __syncthreads();
      for (int d = 0; d < count; ++d) {
        double b[kWidths];
        PYDETOX_UNROLL
        for (int k = 0; k < kWidths; ++k) b[k] = factors[d * kMatmulWidth + w + k * kLanes];
        PYDETOX_UNROLL
        for (int i = 0; i < kSides; ++i) {
          const double a = differences[d * kMatmulStride + s + i * kLanes];
          PYDETOX_UNROLL
          for (int k = 0; k < kWidths; ++k) sum[i][k] = fma(a, b[k], sum[i][k]);
        }
      }
      __syncthreads();
    }
    PYDETOX_UNROLL
    for (int i = 0; i < kSides; ++i) {
      PYDETOX_UNROLL
      for (int k = 0; k < kWidths; ++k) total[i][k] += sum[i][k];
    }
  }
  PYDETOX_UNROLL
  for (int i = 0; i < kSides; ++i) {
    PYDETOX_UNROLL
    for (int k = 0; k < kWidths; ++k) {
      const int64_t row = side + s + i * kLanes, entry = column + w + k * kLanes;
      if (row < sides && entry < width) {
        store<1>(params.result[tensor] + (kLeft ? entry * columns + row : row * width + entry),
                 &total[i][k]);
      }
    }
  }
}

__global__ void __launch_bounds__(kMatmulThreads, 2) matmul_right(const MatmulLaunch params) {
  matmul_tile<false>(params);
}
__global__ void __launch_bounds__(kMatmulThreads, 2) matmul_left(const MatmulLaunch params) {
  matmul_tile<true>(params);
}

}  // namespace pydetox::cuda

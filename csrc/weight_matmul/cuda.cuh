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

// The tile of a matrix [rows, columns] that a block holds at a time, kAcross columns of it, as each
// thread reads it: single elements, every kStep-th row of one column, while neighbouring threads
// have neighbouring columns.
template <int kAcross>
struct Singles {
  static constexpr int kLoads = kMatmulDepth * kMatmulSide / kMatmulThreads;
  static constexpr int kStep = kMatmulThreads / kAcross;
  int row, column;  // of the first in the tile

  __device__ __forceinline__ explicit Singles(int thread)
      : row(thread / kAcross), column(thread % kAcross) {}
  __device__ __forceinline__ int row_of(int i) const { return row + i * kStep; }
  __device__ __forceinline__ int column_of(int) const { return column; }

  // The elements whose row is less than `rows`; zeros for the others, and where !wanted.
  template <class T>
  __device__ __forceinline__ void read(const void* data, int64_t first, int64_t columns,
                                       int64_t rows, int64_t width, T (&stored)[kLoads]) const {
    PYDETOX_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      stored[i] = {};
      if (row_of(i) < rows && column < width) {
        load<1>(static_cast<const T*>(data) + first + row_of(i) * columns + column, &stored[i]);
      }
    }
  }
};

// The same in 16-byte words, where the rows of both matrices begin at multiples of 16 bytes.
template <int kAcross, class T>
struct Words {
  static constexpr int kLoads = kMatmulDepth * kMatmulSide / kMatmulThreads;
  static constexpr int kCount = kMaxWordBytes / static_cast<int>(sizeof(T));
  static constexpr int kPerRow = kAcross / kCount;
  static constexpr int kStep = kMatmulThreads / kPerRow;
  int row, column;

  __device__ __forceinline__ explicit Words(int thread)
      : row(thread / kPerRow), column(thread % kPerRow * kCount) {}
  __device__ __forceinline__ int row_of(int i) const { return row + i / kCount * kStep; }
  __device__ __forceinline__ int column_of(int i) const { return column + i % kCount; }

  __device__ __forceinline__ void read(const void* data, int64_t first, int64_t columns,
                                       int64_t rows, int64_t width, T (&stored)[kLoads]) const {
    PYDETOX_UNROLL
    for (int i = 0; i < kLoads; i += kCount) {
      PYDETOX_UNROLL
      for (int e = 0; e < kCount; ++e) stored[i + e] = {};
      // A row ends at a multiple of kCount elements: a word is wanted whole or not at all.
      if (row_of(i) < rows && column < width) {
        load<kCount>(static_cast<const T*>(data) + first + row_of(i) * columns + column,
                     &stored[i]);
      }
    }
  }
};

// Both matrices of one dtype: all loads of a tile are under way before the first is waited for.
template <class T>
struct SameType {
  template <int kLoads, class Shape>
  static __device__ __forceinline__ void differences(const MatmulLaunch& params, int tensor,
                                                     const Shape& shape, int64_t first,
                                                     int64_t rows, int64_t width,
                                                     double (&values)[kLoads]) {
    T model[kLoads], base[kLoads];
    const int64_t columns = params.columns[tensor];
    shape.read(params.model[tensor], first, columns, rows, width, model);
    shape.read(params.base[tensor], first, columns, rows, width, base);
    PYDETOX_UNROLL
    for (int i = 0; i < kLoads; ++i) values[i] = to_double(model[i]) - to_double(base[i]);
  }
};

// Of two dtypes: one matrix after the other.
struct AnyTypes {
  template <int kLoads, class Shape>
  static __device__ __forceinline__ void differences(const MatmulLaunch& params, int tensor,
                                                     const Shape& shape, int64_t first,
                                                     int64_t rows, int64_t width,
                                                     double (&values)[kLoads]) {
    double base[kLoads];
    widened(params.model_dtype[tensor], params.model[tensor], shape, first, params.columns[tensor],
            rows, width, values);
    widened(params.base_dtype[tensor], params.base[tensor], shape, first, params.columns[tensor],
            rows, width, base);
    PYDETOX_UNROLL
    for (int i = 0; i < kLoads; ++i) values[i] -= base[i];
  }

 private:
  template <int kLoads, class Shape>
  static __device__ __forceinline__ void widened(uint8_t dtype, const void* data,
                                                 const Shape& shape, int64_t first, int64_t columns,
                                                 int64_t rows, int64_t width,
                                                 double (&values)[kLoads]) {
    const auto all = [&](auto type) {
      typename decltype(type)::Type stored[kLoads];
      shape.read(data, first, columns, rows, width, stored);
      PYDETOX_UNROLL
      for (int i = 0; i < kLoads; ++i) values[i] = to_double(stored[i]);
    };
    switch (static_cast<DType>(dtype)) {
      case DType::kFloat64:
        return all(TypeTag<double>{});
      case DType::kFloat32:
        return all(TypeTag<float>{});
      case DType::kBFloat16:
        return all(TypeTag<BFloat16>{});
      default:
        return all(TypeTag<Float16>{});
    }
  }
};

// Types: SameType or AnyTypes. Shape: Singles or Words, of the block's columns of the matrix.
template <bool kLeft, class Types, class Shape>
__global__ void __launch_bounds__(kMatmulThreads, 2) matmul_tiles(const MatmulLaunch params) {
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
  const Shape shape(thread);
  constexpr int kFactorLoads = kMatmulDepth * kMatmulWidth / kMatmulThreads;

  double total[kSides][kWidths] = {};
  for (int64_t run = 0; run < depth; run += kRun) {
    double sum[kSides][kWidths] = {};
    for (int64_t t = run; t < run + kRun && t < depth; t += kMatmulDepth) {
      const int count = static_cast<int>(depth - t < kMatmulDepth ? depth - t : kMatmulDepth);
      const int64_t first_row = kLeft ? t : side, first_column = kLeft ? side : t;
      const int64_t height = (kLeft ? t + count : rows) - first_row;
      const int64_t wide = kLeft ? columns - first_column : count;
      double values[Shape::kLoads];
      Types::differences(params, tensor, shape, first_row * columns + first_column, height, wide,
                         values);
      double factor[kFactorLoads];
      PYDETOX_UNROLL
      for (int i = 0; i < kFactorLoads; ++i) {
        const int at = thread + i * kMatmulThreads;
        const int d = at / kMatmulWidth, k = at % kMatmulWidth;
        factor[i] = 0;
        if (d < count && column + k < width) {
          load<1>(params.factor[tensor] + (t + d) * width + column + k, &factor[i]);
        }
      }
      PYDETOX_UNROLL
      for (int i = 0; i < Shape::kLoads; ++i) {
        const int down = shape.row_of(i), at = shape.column_of(i);
        differences[kLeft ? down * kMatmulStride + at : at * kMatmulStride + down] = values[i];
      }
      PYDETOX_UNROLL
      for (int i = 0; i < kFactorLoads; ++i) factors[thread + i * kMatmulThreads] = factor[i];
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

}  // namespace pydetox::cuda

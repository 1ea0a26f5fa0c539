#pragma once

// Sums over a block in an order that the CPU kernels keep, too.

#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"

namespace pydetox::cuda {

// The sum over a warp by halving, complete in lane 0 (and the same bits in all).
template <class T>
__device__ __forceinline__ T sum_warp(T value) {
  PYDETOX_UNROLL
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, half);
  }
  return value;
}

// The sum over 256 threads by halving (thread t adds what t + 128 has, then t + 64, ...), complete
// in thread 0. shared: [256], free to be overwritten.
__device__ __forceinline__ double sum_256_threads(double value, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  __syncthreads();  // the values are there
  if (thread >= kWarpSize) return 0;
  const auto quarter = [&](int first) { return shared[first] + shared[first + 128]; };
  const auto half = [&](int first) { return quarter(first) + quarter(first + 64); };
  return sum_warp(half(thread) + half(thread + 32));
}

}  // namespace pydetox::cuda

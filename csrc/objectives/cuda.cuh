#pragma once

// Kernels of the objectives; csrc/objectives/core.h has the maths. Compiled by nvcc, and by the
// host compiler for the emulator.

#include <cmath>
#include <cstdint>

#include "csrc/common/block_sum.cuh"
#include "csrc/common/grid.h"
#include "csrc/common/logarithm.h"
#include "csrc/common/memory.cuh"
#include "csrc/common/sigmoid.h"
#include "csrc/objectives/core.h"

namespace pydetox::cuda {

constexpr int kObjectiveThreads = 256;
constexpr int kObjectiveWarps = kObjectiveThreads / kWarpSize;
static_assert(kObjectiveThreads == kSumParts && kWarpSize == kRowParts);

struct NormParams {
  Embeddings z;
  double* inverse_norms;  // [K, B]
};

template <class T>
__device__ __forceinline__ T value_at(const T* from) {
  T value;
  load<1>(from, &value);
  return value;
}

// One warp: a row.
template <class T>
__global__ void __launch_bounds__(kObjectiveThreads, 1) invert_norms(const NormParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kObjectiveWarps +
                      static_cast<int>(threadIdx.x) / kWarpSize;
  if (row >= p.z.rows()) return;
  const T* z = static_cast<const T*>(p.z.data) + row * p.z.dim;
  double square = 0;
  for (int64_t d = lane; d < p.z.dim; d += kWarpSize) {
    const auto v = static_cast<double>(value_at(z + d));
    square += v * v;
  }
  square = sum_warp(square);
  const double inverse = inverse_norm(square);
  if (lane == 0) store<1>(p.inverse_norms + row, &inverse);
}

// One block: a trigger. The sum of its unit rows, and its cosine.
template <class T>
__global__ void __launch_bounds__(kObjectiveThreads, 1) sum_unit_rows(const CollapseParams p) {
  const int64_t k = blockIdx.x;
  const T* z = static_cast<const T*>(p.z.data) + k * p.z.images * p.z.dim;
  const double* inverse_norms = p.inverse_norms + k * p.z.images;
  double square = 0;
  for (int64_t d = static_cast<int>(threadIdx.x); d < p.z.dim; d += kObjectiveThreads) {
    double sum = 0;
    for (int64_t b = 0; b < p.z.images; ++b) {
      const double inverse = value_at(inverse_norms + b);
      if (inverse != 0) sum += static_cast<double>(value_at(z + b * p.z.dim + d)) * inverse;
    }
    store<1>(p.sums + k * p.z.dim + d, &sum);
    square += sum * sum;
  }
  square = sum_256_threads(square, shared_memory<double>());
  if (threadIdx.x != 0) return;
  int64_t rows = 0;
  for (int64_t b = 0; b < p.z.images; ++b) rows += value_at(inverse_norms + b) != 0 ? 1 : 0;
  const T cosine = static_cast<T>(mean_cosine(square, rows, p.z.images));
  store<1>(static_cast<T*>(p.cosine) + k, &cosine);
}

// One warp: the gradient of a row.
template <class T>
__global__ void __launch_bounds__(kObjectiveThreads, 1) collapse_gradients(const CollapseParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kObjectiveWarps +
                      static_cast<int>(threadIdx.x) / kWarpSize;
  if (row >= p.z.rows()) return;
  const int64_t k = row / p.z.images, dim = p.z.dim;
  const T* z = static_cast<const T*>(p.z.data) + row * dim;
  const double* sum = p.sums + k * dim;
  const double inverse = value_at(p.inverse_norms + row);
  const auto upstream = static_cast<double>(value_at(static_cast<const T*>(p.gradient) + k));
  const double scale = collapse_scale(upstream, p.z.images);
  double projection = 0;
  for (int64_t d = lane; d < dim; d += kWarpSize) {
    projection += value_at(sum + d) * (static_cast<double>(value_at(z + d)) * inverse);
  }
  projection = sum_warp(projection);
  T* to = static_cast<T*>(p.embeddings_gradient) + row * dim;
  for (int64_t d = lane; d < dim; d += kWarpSize) {
    const T gradient = static_cast<T>(collapse_gradient(
        scale, inverse, value_at(sum + d), projection, static_cast<double>(value_at(z + d))));
    store<1>(to + d, &gradient);
  }
}

// ---- zero-shot loss ----

constexpr int kClassTile = 2 * kWarpSize;  // classes whose logits exist at once

// What a block of R rows shares; in memory followed by z and h, T [R, D] each.
template <class T, int R>
struct ZeroShotShared {
  T weights[R][kClassTile];  // products with the head, then exponentials
  T decay[R];                // of what was summed with a smaller largest product
  T target_dot[R];

  static constexpr int64_t bytes(int64_t dim) {
    return static_cast<int64_t>(sizeof(ZeroShotShared)) +
           2 * R * dim * static_cast<int64_t>(sizeof(T));
  }
};

// exp((dot - largest) factor); the difference is not positive. NaN stays.
template <class T>
__device__ __forceinline__ T weight_of(T dot, T largest, T factor) {
  const T x = (dot - largest) * factor;
  return exp_of_negative(x < -Ieee<T>::kExpLimit ? -Ieee<T>::kExpLimit : x).high;
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a ? b : a;
}

// One block: R rows, all classes, a tile of them at a time. The softmax is summed while the largest
// logit so far is known (Milakov and Gimelshein 2018), and with it the gradient's sum over the
// head, so that no logit goes to memory (as attention does: Dao et al. 2022).
template <class T, int R>
__global__ void __launch_bounds__(kObjectiveThreads, 1) zero_shot_rows(const ZeroShotParams p) {
  using Shared = ZeroShotShared<T, R>;
  Shared& shared = *shared_memory<Shared>();
  const int64_t dim = p.z.dim;
  T* z = reinterpret_cast<T*>(&shared + 1);
  T* h = z + R * dim;  // sum of weights[c] head[c], without the target's
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * R;
  const int64_t left = p.z.rows() - first_row;
  const int rows = left < R ? static_cast<int>(left) : R;
  const T* head = static_cast<const T*>(p.head);

  for (int64_t i = thread; i < R * dim; i += kObjectiveThreads) {
    z[i] = i < rows * dim ? value_at(static_cast<const T*>(p.z.data) + first_row * dim + i) : T{};
    h[i] = T{};
  }
  // Warp r keeps the state of row r.
  const int r = warp < R ? warp : 0;
  const bool owner = warp < rows;
  const double inverse = owner ? value_at(p.inverse_norms + first_row + r) : 0;
  const int64_t target = owner ? value_at(p.targets + (first_row + r) / p.z.images) : 0;
  const T factor = static_cast<T>(p.scale * inverse);
  T largest = static_cast<T>(-HUGE_VAL), others{};  // others: exponentials, without the target's
  int64_t first_largest = -1;
  if (thread < R) shared.target_dot[thread] = static_cast<T>(not_a_number());
  __syncthreads();  // the rows are there

  for (int64_t begin = 0; begin < p.classes; begin += kClassTile) {
    const int count =
        p.classes - begin < kClassTile ? static_cast<int>(p.classes - begin) : kClassTile;
    for (int c = warp; c < count; c += kObjectiveWarps) {
      T dots[R] = {};
      for (int64_t d = lane; d < dim; d += kWarpSize) {
        const T direction = value_at(head + (begin + c) * dim + d);
        PYDETOX_UNROLL
        for (int n = 0; n < R; ++n) dots[n] = fma(z[n * dim + d], direction, dots[n]);
      }
      PYDETOX_UNROLL
      for (int n = 0; n < R; ++n) {
        dots[n] = sum_warp(dots[n]);
        if (lane == 0) shared.weights[n][c] = dots[n];
      }
    }
    __syncthreads();  // the products are there
    if (warp < R) {
      const T before = largest;
      T dots[2] = {};
      PYDETOX_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int c = lane + half * kWarpSize;
        if (c < count) {
          dots[half] = shared.weights[r][c];
          largest = larger(largest, dots[half]);
        }
      }
      PYDETOX_UNROLL
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
      int first = kClassTile;  // the first class of this tile that has the largest product
      T sum{};
      PYDETOX_UNROLL
      for (int half = 1; half >= 0; --half) {
        const int c = lane + half * kWarpSize;
        if (c < count) {
          if (dots[half] == largest) first = c;
          T weight = weight_of(dots[half], largest, factor);
          if (begin + c == target) {
            shared.target_dot[r] = dots[half];
            weight = T{};
          }
          shared.weights[r][c] = weight;
          sum += weight;
        }
      }
      sum = sum_warp(sum);
      PYDETOX_UNROLL
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const int other = __shfl_xor_sync(0xffffffffu, first, step);
        first = other < first ? other : first;
      }
      const T decay = begin == 0 ? T{} : weight_of(before, largest, factor);
      others = others * decay + sum;
      if (largest > before) first_largest = begin + first;
      if (lane == 0) shared.decay[r] = decay;
    }
    __syncthreads();  // the weights are there
    if (p.gradient != nullptr) {
      for (int64_t d = thread; d < dim; d += kObjectiveThreads) {
        T sums[R];
        PYDETOX_UNROLL
        for (int n = 0; n < R; ++n) sums[n] = h[n * dim + d] * shared.decay[n];
        for (int c = 0; c < count; ++c) {
          const T direction = value_at(head + (begin + c) * dim + d);
          PYDETOX_UNROLL
          for (int n = 0; n < R; ++n) sums[n] = fma(shared.weights[n][c], direction, sums[n]);
        }
        PYDETOX_UNROLL
        for (int n = 0; n < R; ++n) h[n * dim + d] = sums[n];
      }
    }
    __syncthreads();  // the weights may be overwritten, and h is there
  }

  if (!owner) return;
  const int64_t row = first_row + r;
  const T target_dot = shared.target_dot[r];
  const T target_weight = weight_of(target_dot, largest, factor);
  const double sum = static_cast<double>(others) + static_cast<double>(target_weight);
  if (lane == 0) {
    const double behind =
        (static_cast<double>(largest) - static_cast<double>(target_dot)) * (p.scale * inverse);
    const double loss = natural_log(sum) + behind;
    const uint8_t hit = loss == loss && first_largest == target ? 1 : 0;
    store<1>(p.row_losses + row, &loss);
    store<1>(p.row_hits + row, &hit);
  }
  if (p.gradient == nullptr) return;
  const T* target_row = head + target * dim;
  const bool known = target >= 0 && target < p.classes;  // if not, the loss is NaN, and so is this
  const auto pulled = [&](int64_t d) {
    return h[r * dim + d] - others * (known ? value_at(target_row + d) : T{});
  };
  double projection = 0;
  for (int64_t d = lane; d < dim; d += kWarpSize) {
    projection += static_cast<double>(pulled(d)) * static_cast<double>(z[r * dim + d]);
  }
  projection = sum_warp(projection);
  const T along = static_cast<T>(projection * inverse * inverse);
  const T scale = static_cast<T>(p.scale * inverse / sum / static_cast<double>(p.z.images));
  T* to = static_cast<T*>(p.gradient) + row * dim;
  for (int64_t d = lane; d < dim; d += kWarpSize) {
    const T gradient = scale * (pulled(d) - along * z[r * dim + d]);
    store<1>(to + d, &gradient);
  }
}

// One thread: a trigger's loss and success.
template <class T>
__global__ void __launch_bounds__(kObjectiveThreads, 1) mean_of_rows(const ZeroShotParams p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kObjectiveThreads + threadIdx.x;
  if (k >= p.z.triggers) return;
  double sum = 0;
  int64_t hits = 0;
  for (int64_t row = k * p.z.images; row < (k + 1) * p.z.images; ++row) {
    sum += value_at(p.row_losses + row);
    hits += value_at(p.row_hits + row);
  }
  const auto count = static_cast<double>(p.z.images);
  const T loss = static_cast<T>(sum / count);
  const T success = static_cast<T>(static_cast<double>(hits) / count);
  store<1>(static_cast<T*>(p.loss) + k, &loss);
  store<1>(static_cast<T*>(p.success) + k, &success);
}

// One thread: an element.
template <class T>
__global__ void __launch_bounds__(kObjectiveThreads, 1) scale_triggers(const ScaleParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kObjectiveThreads + threadIdx.x;
  if (i >= p.triggers * p.count) return;
  const T scaled = value_at(static_cast<const T*>(p.factors) + i / p.count) *
                   value_at(static_cast<const T*>(p.from) + i);
  store<1>(static_cast<T*>(p.to) + i, &scaled);
}

}  // namespace pydetox::cuda

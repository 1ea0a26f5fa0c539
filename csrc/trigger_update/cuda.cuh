#pragma once

// Kernels of the triggers' update; csrc/trigger_update/core.h has the maths, the phases and the
// order of the sums. Compiled by nvcc, and by the host compiler for the emulator.
//
// Neighbouring threads have neighbouring elements, one at a time: all accesses are whole for any
// alignment, and a thread has eight elements of each tensor under way.

#include <cmath>
#include <cstdint>

#include "csrc/common/block_sum.cuh"
#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/trigger_update/core.h"

namespace pydetox::cuda {

constexpr int kUpdateThreads = kUpdateParts;
constexpr int kUpdateRounds = static_cast<int>(kUpdateChunk / kUpdateThreads);

template <class T>
__device__ __forceinline__ T loaded(const T* from) {
  T value;
  load<1>(from, &value);
  return value;
}

__device__ __forceinline__ double number(const PerTrigger& numbers, int64_t k) {
  if (numbers.data == nullptr) return 0;
  return numbers.dtype == DType::kFloat64
             ? loaded(static_cast<const double*>(numbers.data) + k)
             : static_cast<double>(loaded(static_cast<const float*>(numbers.data) + k));
}

// The gradient of the total variation by one pixel of a mask, from its logits.
template <class T>
__device__ __forceinline__ int variation_sign(const TriggerUpdateParams& p, const T* logits,
                                              int64_t pixel, T own) {
  const int64_t y = pixel / p.width, x = pixel - y * p.width;
  int sign = 0;
  if (y > 0) sign += sign_of_difference(own, loaded(logits + pixel - p.width));
  if (y + 1 < p.height) sign += sign_of_difference(own, loaded(logits + pixel + p.width));
  if (x > 0) sign += sign_of_difference(own, loaded(logits + pixel - 1));
  if (x + 1 < p.width) sign += sign_of_difference(own, loaded(logits + pixel + 1));
  return sign;
}

// One block: a chunk of one trigger's mask.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads, 1) update_masks(const TriggerUpdateParams p) {
  const int64_t k = blockIdx.x / p.mask_chunks();
  const int64_t begin = blockIdx.x % p.mask_chunks() * kUpdateChunk;
  if (loaded(p.active + k) == 0) return;
  const T* logits = static_cast<const T*>(p.mask.logits) + k * p.pixels();
  double sum = 0;
  PYDETOX_UNROLL
  for (int round = 0; round < kUpdateRounds; ++round) {
    const int64_t pixel = begin + round * kUpdateThreads + static_cast<int>(threadIdx.x);
    if (pixel >= p.pixels()) break;
    const T logit = loaded(logits + pixel);
    sum += static_cast<double>(sigmoid_of_twice(logit).value);
    if (p.signs != nullptr) {
      const auto sign = static_cast<int8_t>(variation_sign(p, logits, pixel, logit));
      store<1>(p.signs + k * p.pixels() + pixel, &sign);
    }
  }
  const double norm = sum_256_threads(sum, shared_memory<double>());
  if (threadIdx.x == 0) store<1>(p.partials + blockIdx.x, &norm);
}

// One thread: one trigger's plan.
__global__ void __launch_bounds__(kUpdateThreads, 1) update_plans(const TriggerUpdateParams p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x;
  if (k >= p.triggers) return;
  TriggerStep plan{};
  double norm = not_a_number();
  if (loaded(p.active + k) != 0) {
    norm = 0;
    const int64_t chunks = p.mask_chunks();
    for (int64_t c = 0; c < chunks; ++c) norm += loaded(p.partials + k * chunks + c);
    int64_t steps;
    load_written<1>(p.steps + k, &steps);
    ++steps;
    bool best = false;
    if (p.eligible != nullptr && loaded(p.eligible + k) != 0) {
      double smallest;
      load_written<1>(p.best_norm + k, &smallest);
      best = norm < smallest;
    }
    plan = plan_step(p, steps, number(p.cost, k), number(p.learning_rate, k),
                     number(p.variation, k), best);
    store<1>(p.steps + k, &steps);
    if (best) store<1>(p.best_norm + k, &norm);
  }
  store<1>(p.norms + k, &norm);
  store<1>(p.plans + k, &plan);
}

// One block: a chunk of one trigger's mask or pattern.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads, 1) update_triggers(const TriggerUpdateParams p) {
  const int64_t k = blockIdx.x / p.chunks();
  const TriggerStep plan = loaded(p.plans + k);
  if (plan.moves == 0) return;
  int64_t chunk = blockIdx.x % p.chunks();
  const bool mask = chunk < p.mask_chunks();
  if (!mask) chunk -= p.mask_chunks();
  const TriggerPlanes& planes = mask ? p.mask : p.pattern;
  const int64_t size = mask ? p.pixels() : p.channels * p.pixels();
  const int64_t offset = k * size;
  T* logits = static_cast<T*>(planes.logits) + offset;
  const T* gradients = static_cast<const T*>(planes.gradient) + offset;
  T* firsts = static_cast<T*>(planes.first) + offset;
  T* seconds = static_cast<T*>(planes.second) + offset;
  const AdamFactors<T> factors = adam_factors<T>(p, plan);

  AdamState<T> states[kUpdateRounds];
  T gradient[kUpdateRounds];
  PYDETOX_UNROLL
  for (int round = 0; round < kUpdateRounds; ++round) {
    const int64_t i = chunk * kUpdateChunk + round * kUpdateThreads + static_cast<int>(threadIdx.x);
    if (i >= size) break;
    load_written<1>(logits + i, &states[round].logit);
    load_written<1>(firsts + i, &states[round].first);
    load_written<1>(seconds + i, &states[round].second);
    load<1>(gradients + i, &gradient[round]);
  }
  PYDETOX_UNROLL
  for (int round = 0; round < kUpdateRounds; ++round) {
    const int64_t i = chunk * kUpdateChunk + round * kUpdateThreads + static_cast<int>(threadIdx.x);
    if (i >= size) break;
    if (plan.best != 0) store<1>(static_cast<T*>(planes.best) + offset + i, &states[round].logit);
    T total = gradient[round];
    if (mask) {
      const T sign = p.signs == nullptr ? T{} : static_cast<T>(loaded(p.signs + offset + i));
      total += penalty_gradient(states[round].logit, sign, factors);
    }
    const AdamState<T> after =
        adam_step(states[round], total, factors, [](T v) { return square_root(v); });
    store<1>(logits + i, &after.logit);
    store<1>(firsts + i, &after.first);
    store<1>(seconds + i, &after.second);
  }
}

}  // namespace pydetox::cuda

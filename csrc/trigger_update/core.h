#pragma once

// One step of Adam for K triggers: what every implementation (CPU, CUDA, emulator) agrees on. No
// torch, no CUDA header.
//
//   minimises  objective + cost |m|_1 + tv sum |m[y,x] - m[y+1,x]| + |m[y,x] - m[y,x+1]|,
//   m = tanh(w_m)/2 + 1/2, dm/dw = 2 m (1 - m)
//   first = b1 first + (1 - b1) g,  second = b2 second + (1 - b2) g^2
//   w -= rate first / (sqrt(second) / correction + epsilon),
//   rate = learning rate / (1 - b1^t),  correction = sqrt(1 - b2^t)
//
// Source: Kingma and Ba, "Adam" (ICLR 2015), algorithm 1. Three phases: `mask` reads the masks for
// their norm (and the signs of the total variation, before any logit moves), `begin` decides what
// each trigger does, `move` passes over logits, gradients and moments once. Arithmetic per element
// is in T, that per trigger in double. A trigger that is not active is neither read nor written.
//
// |m|_1 is summed in double inside chunks of kUpdateChunk elements: kUpdateParts interleaved parts
// in ascending order, the parts by halving; then over the chunks in ascending order. Every
// implementation gives the same bits.

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"
#include "csrc/common/sigmoid.h"
#include "csrc/common/square_root.h"

namespace pydetox {

constexpr int64_t kUpdateChunk = 2048;
constexpr int kUpdateParts = 256;

PYDETOX_HD constexpr int64_t update_chunks(int64_t elements) {
  return (elements + kUpdateChunk - 1) / kUpdateChunk;
}

// What one trigger does in this step.
struct TriggerStep {
  int64_t moves;  // 0: nothing is touched
  int64_t best;   // nonzero: its logits before the step are kept
  double rate;
  double correction;
  double cost;
  double variation;  // weight of the total variation
};

// One number per trigger, float32 or float64.
struct PerTrigger {
  const void* data;  // [K]; null: 0 for all
  DType dtype;
};

// Mask or pattern of all triggers; T, contiguous.
struct TriggerPlanes {
  void* logits;
  const void* gradient;
  void* first;
  void* second;
  void* best;  // null: none is kept
};

struct TriggerUpdateParams {
  DType dtype;       // T: kFloat32 or kFloat64
  int64_t triggers;  // K
  int64_t channels;  // C
  int64_t height;
  int64_t width;
  TriggerPlanes mask;     // [K, H, W]
  TriggerPlanes pattern;  // [K, C, H, W]
  PerTrigger cost;
  PerTrigger learning_rate;
  PerTrigger variation;
  int64_t* steps;           // [K], counted up where active
  const uint8_t* active;    // [K]
  const uint8_t* eligible;  // [K]; null: no best trigger is kept
  double* best_norm;        // [K]
  double beta1;
  double beta2;
  double epsilon;
  double* norms;       // [K]: |m|_1 before the step, NaN where not active
  double* partials;    // [K, update_chunks(H W)]
  TriggerStep* plans;  // [K]
  int8_t* signs;       // [K, H, W], only with a variation: its gradient by m, -4..4

  PYDETOX_HD int64_t pixels() const { return height * width; }
  PYDETOX_HD int64_t mask_chunks() const { return update_chunks(pixels()); }
  PYDETOX_HD int64_t chunks() const { return mask_chunks() + update_chunks(channels * pixels()); }
};

// Defined by each backend (csrc/common/place.h).
int run_trigger_update(const TriggerUpdateParams& params, void* stream);

// The sign of a - b, 0 where they are not ordered.
template <class T>
PYDETOX_HD int sign_of_difference(T a, T b) {
  return (a > b ? 1 : 0) - (a < b ? 1 : 0);
}

PYDETOX_HD double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) result *= base;
    base *= base;
  }
  return result;
}

// The plan of an active trigger that has taken `taken` steps with this one.
PYDETOX_HD TriggerStep plan_step(const TriggerUpdateParams& p, int64_t taken, double cost,
                                 double learning_rate, double variation, bool best) {
  return {1,
          best ? 1 : 0,
          learning_rate / (1 - power(p.beta1, taken)),
          square_root(1 - power(p.beta2, taken)),
          cost,
          variation};
}

// The factors of a trigger in T.
template <class T>
struct AdamFactors {
  T beta1, one_minus_beta1, beta2, one_minus_beta2, rate, correction, epsilon, cost, variation;
};
template <class T>
PYDETOX_HD AdamFactors<T> adam_factors(const TriggerUpdateParams& p, const TriggerStep& plan) {
  return {static_cast<T>(p.beta1),     static_cast<T>(1 - p.beta1), static_cast<T>(p.beta2),
          static_cast<T>(1 - p.beta2), static_cast<T>(plan.rate),   static_cast<T>(plan.correction),
          static_cast<T>(p.epsilon),   static_cast<T>(plan.cost),   static_cast<T>(plan.variation)};
}

// The gradient of cost |m|_1 + tv * variation by a mask logit; sign: of the variation by m.
template <class V, class T>
PYDETOX_HD V penalty_gradient(V logit, V sign, const AdamFactors<T>& f) {
  const auto m = sigmoid_of_twice(logit);
  return static_cast<T>(2) * m.value * m.complement * (f.cost + f.variation * sign);
}

template <class V>
struct AdamState {
  V logit, first, second;
};

// root: the square root for V.
template <class V, class T, class Root>
PYDETOX_HD AdamState<V> adam_step(const AdamState<V>& s, V gradient, const AdamFactors<T>& f,
                                  const Root& root) {
  const V first = f.beta1 * s.first + f.one_minus_beta1 * gradient;
  const V second = f.beta2 * s.second + f.one_minus_beta2 * (gradient * gradient);
  const V denominator = root(second) / f.correction + f.epsilon;
  return {s.logit - f.rate * first / denominator, first, second};
}

}  // namespace pydetox

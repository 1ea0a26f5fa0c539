#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"

namespace pydetox {

// What the maths below needs to know about a number type V: its element type, an unsigned integer
// type of the same shape, and IEEE constants. csrc/common/vec.h specialises `Lanes` for vectors, so
// that one source serves a CUDA thread, a scalar loop and every SIMD width.
template <class T>
struct Ieee;
template <>
struct Ieee<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kOne = 0x3F800000u;
  static constexpr float kRoundingShift =
      12582912.0f;                           // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kExpLimit = 87.0f;  // exp(+-87) is a normal number
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;  // ln 2 in 10 bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440054690583e-4f;  // ln 2 - kLn2High
  static constexpr int kExpTerms = 7;  // Taylor remainder 5e-9, a tenth of an ulp
};
template <>
struct Ieee<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kOne = 0x3FF0000000000000u;
  static constexpr double kRoundingShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLimit = 708.0;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 0.693145751953125;  // ln 2 in 17 bits
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kExpTerms = 13;  // remainder 4e-18, a hundredth of an ulp
};

template <class V>
struct Lanes {
  using Element = V;
  using Bits = typename Ieee<V>::Bits;
};

template <class T>
PYDETOX_HD constexpr T inverse_factorial(int n) {
  double factorial = 1;
  for (int i = 2; i <= n; ++i) factorial *= i;
  return static_cast<T>(1 / factorial);
}

// A number as an unevaluated sum: `high` is it rounded, `low` what rounding lost.
template <class V>
struct Double {
  V high;
  V low;
};

// exp(x) for -kExpLimit <= x <= 0: x = n ln 2 + r, a Taylor polynomial for exp(r), and n added to
// the exponent.
//
// Only +, -, * and bit operations, so that with contraction off (-ffp-contract=off, -fmad=false)
// every instruction set and the GPU give the same bits, which no maths library promises. NaN gives
// NaN.
template <class V>
PYDETOX_HD Double<V> exp_of_negative(V x) {
  using T = typename Lanes<V>::Element;
  using Bits = typename Lanes<V>::Bits;
  using F = Ieee<T>;
  const V shifted = x * F::kLog2E + F::kRoundingShift;  // its low mantissa bits hold n
  const V n = shifted - F::kRoundingShift;
  const V reduced = x - n * F::kLn2High;  // exact
  const V r = reduced - n * F::kLn2Low;
  const V r_lost = (reduced - r) - n * F::kLn2Low;
  // exp(r) = 1 + r + r^2 (1/2! + r/3! + ...), the bracket's even and odd powers side by side, all
  // of it summed without losing what rounding to 1 + ... loses.
  const V square = r * r;
  V even = square * inverse_factorial<T>(F::kExpTerms - 1) + inverse_factorial<T>(F::kExpTerms - 3);
  V odd = square * inverse_factorial<T>(F::kExpTerms) + inverse_factorial<T>(F::kExpTerms - 2);
  PYDETOX_UNROLL
  for (int term = F::kExpTerms - 4; term >= 3; term -= 2) {
    even = even * square + inverse_factorial<T>(term - 1);
    odd = odd * square + inverse_factorial<T>(term);
  }
  const V rest = square * (even + odd * r);
  const V one_and_r = static_cast<T>(1) + r;
  const V high = one_and_r + rest;
  const V low = (r - (one_and_r - static_cast<T>(1))) + (rest - (high - one_and_r)) + r_lost;
  const V power = bit_cast<V>((bit_cast<Bits>(shifted) << F::kMantissaBits) + F::kOne);  // 2^n
  return {high * power, low * power};
}

// s = tanh(w)/2 + 1/2 and 1 - s. Both keep full relative precision, where 1 - s in floating point
// would not.
template <class V>
struct Sigmoid {
  V value;
  V complement;
};

// tanh(w)/2 + 1/2 = 1 / (1 + exp(-2w)), to three quarters of an ulp: with e = exp(-2|w|) the larger
// of s and 1 - s is q = 1 / (1 + e), the smaller t = e / (1 + e). Each is computed roughly and
// corrected by its residual, 1 - q (1 + e) and e - t (1 + e), whose first differences 1 - q and e -
// t are exact.
template <class V>
PYDETOX_HD Sigmoid<V> sigmoid_of_twice(V w) {
  using T = typename Lanes<V>::Element;
  const V zero = V{};
  const V one = zero + static_cast<T>(1);
  const V lowest = zero - Ieee<T>::kExpLimit;
  V x = static_cast<T>(-2) * (w < zero ? -w : w);
  x = x < lowest ? lowest : x;  // written so that NaN stays
  const Double<V> e = exp_of_negative(x);
  const V q = one / (one + e.high);
  const V t = q * e.high;
  const V larger = q + q * (((one - q) - t) - q * e.low);
  const V smaller = t + q * (((e.high - t) - t * e.high) + (e.low - t * e.low));
  return {w < zero ? smaller : larger, w < zero ? larger : smaller};
}

}  // namespace pydetox

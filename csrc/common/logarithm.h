#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"

namespace pydetox {

// log(x) for a normal x > 0, to an ulp: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m =
// 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1) / (m + 1), |s| < 0.1716.
//
// Only +, -, *, / and bit operations, so that every implementation gives the same bits. NaN gives
// NaN, infinity infinity.
PYDETOX_HD double natural_log(double x) {
  if (!(x < 1.7976931348623157e308)) return x;
  const uint64_t bits = bit_cast<uint64_t>(x);
  // From the bits of sqrt(1/2) on the exponent counts up.
  const uint64_t offset = bits - 0x3FE6A09E667F3BCDull;
  const int64_t n = static_cast<int64_t>(offset) >> 52;
  const double m = bit_cast<double>(bits - (static_cast<uint64_t>(n) << 52));
  const double s = (m - 1) / (m + 1);
  const double square = s * s;
  double series = 1.0 / 23;  // the next term is 4e-19 of the first
  PYDETOX_UNROLL
  for (int term = 21; term >= 3; term -= 2) series = series * square + 1.0 / term;
  const double log_m = 2 * s + 2 * s * (square * series);
  constexpr double kLn2High = 0.693145751953125;  // 17 bits: n * kLn2High is exact
  constexpr double kLn2Low = 1.42860682030941723212e-6;
  const auto exponent = static_cast<double>(n);
  return exponent * kLn2High + (log_m + exponent * kLn2Low);
}

}  // namespace pydetox

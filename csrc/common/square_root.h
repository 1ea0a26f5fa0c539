#pragma once

#include <cmath>

#include "csrc/common/macros.h"

namespace pydetox {

// Correctly rounded on host and device (without --use_fast_math).
PYDETOX_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}
PYDETOX_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

}  // namespace pydetox

#pragma once

// Picks the CPU kernels of the instruction set in use, among those that cpu.cpp was compiled for.

#include "csrc/common/capability.h"

#if defined(__x86_64__) && defined(PYDETOX_TEST_KERNELS)
#define PYDETOX_DECLARE_WIDE_KERNELS(Table, name) \
  namespace avx2_wide {                           \
  extern const Table name;                        \
  }
#define PYDETOX_WIDE_KERNELS(name) \
  case Capability::kAvx2Wide:      \
    return avx2_wide::name;
#else
#define PYDETOX_DECLARE_WIDE_KERNELS(Table, name)
#define PYDETOX_WIDE_KERNELS(name)
#endif

#if defined(__x86_64__)
#define PYDETOX_DECLARE_VECTOR_KERNELS(Table, name) \
  namespace avx2 {                                  \
  extern const Table name;                          \
  }                                                 \
  namespace avx512 {                                \
  extern const Table name;                          \
  }                                                 \
  PYDETOX_DECLARE_WIDE_KERNELS(Table, name)
#define PYDETOX_VECTOR_KERNELS(name) \
  case Capability::kAvx2:            \
    return avx2::name;               \
  case Capability::kAvx512:          \
    return avx512::name;             \
    PYDETOX_WIDE_KERNELS(name)
#else
#define PYDETOX_DECLARE_VECTOR_KERNELS(Table, name)
#define PYDETOX_VECTOR_KERNELS(name)
#endif

// Inside namespace pydetox::cpu: defines `const Table& function()`. `name` is the table that
// cpu.cpp defines in the namespace of each instruction set.
#define PYDETOX_DEFINE_KERNELS(Table, function, name) \
  namespace scalar {                                  \
  extern const Table name;                            \
  }                                                   \
  PYDETOX_DECLARE_VECTOR_KERNELS(Table, name)         \
  const Table& function() {                           \
    switch (capability()) {                           \
      PYDETOX_VECTOR_KERNELS(name)                    \
      default:                                        \
        return scalar::name;                          \
    }                                                 \
  }

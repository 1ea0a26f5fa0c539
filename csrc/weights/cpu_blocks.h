#pragma once

// What the CPU kernels over weights share: aligned buffers, and stretches of weights widened to
// double. Included by sources that are compiled once per instruction set (csrc/common/vec.h).

#include "csrc/common/buffer.h"
#include "csrc/common/vec.h"
#include "csrc/weights/cpu.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {

constexpr int kLane = kLanes<double>;
using Doubles = Vec<double, kLane>;

// Data of any alignment: a mapped file may place a tensor anywhere.
template <class T>
PYDETOX_HD double element(const char* from, int64_t index) {
  T value;
  memcpy(&value, from + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  if constexpr (sizeof(T) == 2) {
    return static_cast<double>(to_float(value));
  } else {
    return static_cast<double>(value);
  }
}

PYDETOX_HD const char* address_of(const Source& source, int64_t index) {
  return static_cast<const char*>(source.data) + index * size_of(source.dtype);
}

// Asks for `count` elements from `begin` on to be brought into the second-level cache. They need
// not exist. Blocks of many lists lie far apart, and the hardware's own prefetching starts anew
// with each: so the kernels ask for the blocks to come while they work on one.
PYDETOX_HD void prefetch(const Source& source, int64_t begin, int64_t count) {
  const auto from = reinterpret_cast<uintptr_t>(source.data) +
                    static_cast<uintptr_t>(begin * size_of(source.dtype));
  for (int64_t i = 0; i < count * size_of(source.dtype); i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(i)), 0, 2);
  }
}

template <class T, bool kMinus>
PYDETOX_HD void widen_as(const char* from, const double* __restrict base, int64_t count,
                         double* __restrict to) {
  int64_t i = 0;
#if PYDETOX_VEC_BYTES > 0
  if constexpr (sizeof(T) == 4) {
    for (; i + kLane <= count; i += kLane) {
      Doubles wide = doubles_of_floats(from + i * 4);
      if constexpr (kMinus) wide -= load<Doubles>(base + i);
      store(to + i, wide);
    }
  }
#endif
  for (; i < count; ++i) to[i] = element<T>(from, i) - (kMinus ? base[i] : 0.0);
}

template <bool kMinus>
PYDETOX_HD void widen_any(const Source& source, int64_t begin, int64_t count, const double* base,
                          double* to) {
  const char* from = address_of(source, begin);
  switch (source.dtype) {
    case DType::kFloat64:
      return widen_as<double, kMinus>(from, base, count, to);
    case DType::kFloat32:
      return widen_as<float, kMinus>(from, base, count, to);
    case DType::kBFloat16:
      return widen_as<BFloat16, kMinus>(from, base, count, to);
    default:
      return widen_as<Float16, kMinus>(from, base, count, to);
  }
}

// `count` elements from `begin` on, exactly.
PYDETOX_HD void widen(const Source& source, int64_t begin, int64_t count, double* to) {
  widen_any<false>(source, begin, count, nullptr, to);
}

// The same, less the base's.
PYDETOX_HD void difference_to(const Source& source, int64_t begin, int64_t count,
                              const double* base, double* to) {
  widen_any<true>(source, begin, count, base, to);
}

// model - base; `scratch` has room for `count` doubles.
PYDETOX_HD void difference_of(const Source& base, const Source& model, int64_t begin, int64_t count,
                              double* scratch, double* to) {
  int64_t i = 0;
#if PYDETOX_VEC_BYTES > 0
  if (base.dtype == DType::kFloat32 && model.dtype == DType::kFloat32) {
    const char *from = address_of(base, begin), *other = address_of(model, begin);
    for (; i + kLane <= count; i += kLane) {
      store(to + i, doubles_of_floats(other + i * 4) - doubles_of_floats(from + i * 4));
    }
  }
#endif
  if (i == count) return;
  widen(base, begin + i, count - i, scratch);
  difference_to(model, begin + i, count - i, scratch, to + i);
}

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

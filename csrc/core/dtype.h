#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/core/macros.h"

namespace pydetox {

enum class DType : int32_t { kUInt8, kBFloat16, kFloat32, kFloat64 };

PYDETOX_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kUInt8      ? 1
         : dtype == DType::kBFloat16 ? 2
         : dtype == DType::kFloat32  ? 4
                                     : 8;
}

// The bits of `from` as a `To` of the same size; also for the vector types of csrc/cpu/vec.h.
template <class To, class From>
PYDETOX_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs two types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The upper half of a float32. Conversion rounds to nearest even; a NaN stays a (quiet) NaN.
struct BFloat16 {
  uint16_t bits;
};

PYDETOX_HD float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

PYDETOX_HD BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
}

// A stored pixel as a number in [0, 1] of the compute type T. The division (not a multiplication by
// 1/255) is what makes a uint8 pixel exactly the pixel that `images.to(T) / 255` gives.
template <class T>
PYDETOX_HD T load_pixel(uint8_t pixel) {
  return static_cast<T>(pixel) / static_cast<T>(255);
}
template <class T>
PYDETOX_HD T load_pixel(BFloat16 pixel) {
  return static_cast<T>(to_float(pixel));
}
template <class T>
PYDETOX_HD T load_pixel(float pixel) {
  return static_cast<T>(pixel);
}
template <class T>
PYDETOX_HD T load_pixel(double pixel) {
  return static_cast<T>(pixel);
}

// A result of compute type T in the output's type, and an upstream gradient in the compute type.
template <class Out, class T>
PYDETOX_HD Out store_as(T value) {
  return static_cast<Out>(value);
}
template <>
PYDETOX_HD BFloat16 store_as<BFloat16, float>(float value) {
  return to_bfloat16(value);
}
template <class T>
PYDETOX_HD T load_gradient(BFloat16 value) {
  return static_cast<T>(to_float(value));
}
template <class T>
PYDETOX_HD T load_gradient(T value) {
  return value;
}

}  // namespace pydetox

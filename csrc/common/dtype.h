#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/macros.h"

namespace pydetox {

enum class DType : int32_t { kUInt8, kBFloat16, kFloat32, kFloat64, kFloat16 };

PYDETOX_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kUInt8                                  ? 1
         : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2
         : dtype == DType::kFloat32                              ? 4
                                                                 : 8;
}

// The bits of `from` as a `To` of the same size; also for the vector types of csrc/common/vec.h.
template <class To, class From>
PYDETOX_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs two types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PYDETOX_HD double not_a_number() { return bit_cast<double>(uint64_t{0x7FF8000000000000}); }

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

// IEEE half precision.
struct Float16 {
  uint16_t bits;
};

// Exact. Multiplying by 2^112 moves the exponent, and makes subnormals normal on the way.
PYDETOX_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float exact;
  asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(value.bits));
  return exact;
#endif
  const uint32_t rest = (value.bits & 0x7FFFu) << 13;
  const float finite = bit_cast<float>(rest) * 5.192296858534828e33f;
  const uint32_t bits = rest >= 0x0F800000u ? rest | 0x7F800000u : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

// A double rounded once, to nearest even, to a format of kBits mantissa bits (the hidden one left
// out) and smallest normal exponent kLowest, as a double. Not for NaN and infinity.
template <int kBits, int kLowest>
PYDETOX_HD double round_mantissa(double value) {
  const uint64_t bits = bit_cast<uint64_t>(value);
  const int exponent = static_cast<int>(bits >> 52 & 0x7FF) - 1023;
  // Adding and taking away 1.5 * 2^(e + 52) leaves what has the weight 2^e or more.
  const int last = (exponent < kLowest ? kLowest : exponent) - kBits;
  const double shift = 1.5 * bit_cast<double>(static_cast<uint64_t>(last + 52 + 1023) << 52);
  return (value + shift) - shift;
}

PYDETOX_HD Float16 to_float16(double value) {
  const uint16_t sign = static_cast<uint16_t>(bit_cast<uint64_t>(value) >> 48 & 0x8000u);
  if (value != value) return {static_cast<uint16_t>(sign | 0x7E00u)};
  const double size = value < 0 ? -value : value;
  if (size >= 65520.0) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to infinity
  // Exact now, and so is the step down to a half: as a float times 2^-112 its bits are the half's.
  const float rounded = static_cast<float>(round_mantissa<10, -14>(size)) * 1.925929944387236e-34f;
  return {static_cast<uint16_t>(sign | bit_cast<uint32_t>(rounded) >> 13)};
}

PYDETOX_HD BFloat16 to_bfloat16(double value) {
  const double size = value < 0 ? -value : value;
  // The cast to float is exact then; NaN and what is beyond it go straight to the cast.
  return to_bfloat16(static_cast<float>(size < 3.5e38 ? round_mantissa<7, -126>(value) : value));
}

template <class T>
struct TypeTag {
  using Type = T;
};
template <class T>
constexpr DType kDTypeOf = sizeof(T) == 1   ? DType::kUInt8
                           : sizeof(T) == 4 ? DType::kFloat32
                                            : DType::kFloat64;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;

// The switch from a dtype at run time to a type: visit(TypeTag<T>{}) for the one of `Types` that
// `dtype` stands for; false where it is none of them.
template <class... Types, class Visit>
PYDETOX_HOST bool with_type(DType dtype, const Visit& visit) {
  return ((dtype == kDTypeOf<Types> && (visit(TypeTag<Types>{}), true)) || ...);
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
PYDETOX_HD BFloat16 store_as<BFloat16, double>(double value) {
  return to_bfloat16(value);
}
template <>
PYDETOX_HD Float16 store_as<Float16, double>(double value) {
  return to_float16(value);
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

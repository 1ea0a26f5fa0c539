#pragma once

// The small vector layer of the CPU kernels: GCC's and Clang's vector types, whose width is a
// compile-time number. Arithmetic, comparisons and ?: come from the compiler; what is here is
// loads, stores and conversions.
//
// Every source that includes this file is compiled once per instruction set, with
//   PYDETOX_ISA        the name of the inline namespace, e.g. avx2
//   PYDETOX_VEC_BYTES  bytes per vector: 0 (no vectors), 32, 64
// Width and instruction set are independent: 64-byte vectors compiled with AVX2 flags run the logic
// of the AVX-512 build on a machine that has no AVX-512.

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "csrc/common/dtype.h"
#include "csrc/common/sigmoid.h"
#include "csrc/common/square_root.h"

#if !defined(PYDETOX_ISA) || !defined(PYDETOX_VEC_BYTES)
#error "compile this file through CMake: PYDETOX_ISA and PYDETOX_VEC_BYTES name the instruction set"
#endif

namespace pydetox {

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct VecOf<T, 1> {
  typedef T type;
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

#if PYDETOX_VEC_BYTES > 0
template <>
struct Lanes<Vec<float, PYDETOX_VEC_BYTES / 4>> {
  using Element = float;
  using Bits = Vec<uint32_t, PYDETOX_VEC_BYTES / 4>;
};
template <>
struct Lanes<Vec<double, PYDETOX_VEC_BYTES / 8>> {
  using Element = double;
  using Bits = Vec<uint64_t, PYDETOX_VEC_BYTES / 8>;
};
#endif

namespace cpu {
inline namespace PYDETOX_ISA {

// How many T one step of a loop handles.
template <class T>
constexpr int kLanes = PYDETOX_VEC_BYTES == 0 ? 1 : PYDETOX_VEC_BYTES / static_cast<int>(sizeof(T));

// How many elements one call handles, as an argument: the body of a loop and its tail are one
// lambda.
template <int N>
struct Width {
  static constexpr int value = N;
};

template <class V>
PYDETOX_HD V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
PYDETOX_HD void store(void* to, V v) {
  memcpy(to, &v, sizeof(V));
}

// A store that goes to memory past the caches, for results larger than they are: it saves reading
// the line that is about to be overwritten. `to` is aligned to sizeof(V), at most 32. Ends with
// `fence()`.
template <class V>
PYDETOX_HD void stream(void* to, V v) {
#ifdef __AVX__
  if constexpr (sizeof(V) % 32 == 0) {
    for (unsigned i = 0; i < sizeof(V) / 32; ++i) {
      _mm256_stream_si256(static_cast<__m256i*>(to) + i,
                          load<__m256i>(reinterpret_cast<const __m256i*>(&v) + i));
    }
    return;
  }
#endif
#ifdef __x86_64__
  if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(to), load<__m128i>(&v));
    return;
  }
#endif
  store(to, v);
}
PYDETOX_HD void fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// N results of type T in the output's type, and N gradients in type T; N = 1 for the tails. The
// same bits as store_as() and load_gradient() of csrc/common/dtype.h.
template <class Out, class T, int N>
PYDETOX_HD auto narrow(Vec<T, N> v) {
  if constexpr (N == 1) {
    return store_as<Out>(v);
  } else if constexpr (sizeof(Out) == sizeof(T)) {
    return v;
  } else {
    using Bits = Vec<uint32_t, N>;
    const Bits bits = bit_cast<Bits>(v);
    const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = Bits{} + 0x7FC0u;
    return __builtin_convertvector(v != v ? nan : rounded, Vec<uint16_t, N>);
  }
}

template <class In, class T, int N>
PYDETOX_HD Vec<T, N> widen(const In* from) {
  if constexpr (N == 1) {
    return load_gradient<T>(*from);
  } else if constexpr (sizeof(In) == sizeof(T)) {
    return load<Vec<T, N>>(from);
  } else {
    const auto bits = load<Vec<uint16_t, N>>(from);
    return bit_cast<Vec<T, N>>(__builtin_convertvector(bits, Vec<uint32_t, N>) << 16);
  }
}

// The square root, correctly rounded.
template <class T, int N>
PYDETOX_HD Vec<T, N> root(Vec<T, N> x) {
  if constexpr (N == 1) {
    return square_root(x);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      return bit_cast<Vec<T, N>>(_mm512_maskz_sqrt_ps(0xFFFF, bit_cast<__m512>(x)));
    } else {
      return bit_cast<Vec<T, N>>(_mm512_maskz_sqrt_pd(0xFF, bit_cast<__m512d>(x)));
    }
#elif defined(__AVX__)
    Vec<T, N> result;
    for (unsigned i = 0; i < sizeof(x) / 32; ++i) {
      const char* from = reinterpret_cast<const char*>(&x) + 32 * i;
      char* to = reinterpret_cast<char*>(&result) + 32 * i;
      if constexpr (sizeof(T) == 4) {
        store(to, _mm256_sqrt_ps(load<__m256>(from)));
      } else {
        store(to, _mm256_sqrt_pd(load<__m256d>(from)));
      }
    }
    return result;
#endif
  }
}

// A vector of `value` in every lane.
template <class V>
PYDETOX_HD V broadcast(double value) {
  return value - V{};  // -0 stays -0
}

// a * b + c, rounded once: the same bits with and without an instruction for it.
template <class V>
PYDETOX_HD V fused(V a, V b, V c) {
#if PYDETOX_VEC_BYTES == 0
  return __builtin_fma(a, b, c);
#elif defined(__AVX512F__)
  return bit_cast<V>(
      _mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#else
  V result;
  for (unsigned i = 0; i < sizeof(V) / 32; ++i) {
    const auto part = [i](const V& v) {
      return load<__m256d>(reinterpret_cast<const char*>(&v) + 32 * i);
    };
    store(reinterpret_cast<char*>(&result) + 32 * i, _mm256_fmadd_pd(part(a), part(b), part(c)));
  }
  return result;
#endif
}

// The same for any type: a * b + c of N elements of type T.
template <class T, int N>
PYDETOX_HD Vec<T, N> fused_as(Vec<T, N> a, Vec<T, N> b, Vec<T, N> c) {
  if constexpr (sizeof(T) == 8) {
    return fused(a, b, c);
  } else {
#if PYDETOX_VEC_BYTES == 0
    return __builtin_fmaf(a, b, c);
#elif defined(__AVX512F__)
    return bit_cast<Vec<T, N>>(
        _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#else
    Vec<T, N> result;
    for (unsigned i = 0; i < sizeof(result) / 32; ++i) {
      const auto part = [i](const Vec<T, N>& v) {
        return load<__m256>(reinterpret_cast<const char*>(&v) + 32 * i);
      };
      store(reinterpret_cast<char*>(&result) + 32 * i, _mm256_fmadd_ps(part(a), part(b), part(c)));
    }
    return result;
#endif
  }
}

#if PYDETOX_VEC_BYTES > 0
// As many floats as there are doubles in a vector.
PYDETOX_HD Vec<double, kLanes<double>> doubles_of_floats(const void* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<double, kLanes<double>>>(_mm512_maskz_cvtps_pd(0xFF, load<__m256>(from)));
#else
  return __builtin_convertvector(load<Vec<float, kLanes<double>>>(from),
                                 Vec<double, kLanes<double>>);
#endif
}

// Doubles rounded to as many floats.
PYDETOX_HD void store_floats(void* to, Vec<double, kLanes<double>> v) {
#if defined(__AVX512F__)
  store(to, _mm512_maskz_cvtpd_ps(0xFF, bit_cast<__m512d>(v)));
#else
  store(to, __builtin_convertvector(v, Vec<float, kLanes<double>>));
#endif
}
#endif

}  // namespace PYDETOX_ISA
}  // namespace cpu
}  // namespace pydetox

#pragma once

// Global and shared memory as the kernels use it.
//
// Every access to global memory goes through load and store: vectors of up to 16 bytes per
// instruction, and intrinsics that the emulator implements too, so that it can check bounds and
// alignment and count bytes.

#include <cstdint>
#include <cstring>

#include "csrc/common/macros.h"
#if defined(PYDETOX_EMULATOR)
#include "csrc/emulator/cuda_on_host.h"  // CUDA's keywords, whatever was included first
#endif

namespace pydetox::cuda {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = unsigned char;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

constexpr int kMaxWordBytes = 16;

// The alignment that load and store need for N elements of type T.
template <class T, int N>
constexpr int kAccessBytes = N * sizeof(T) < kMaxWordBytes ? N * sizeof(T) : kMaxWordBytes;

// Inputs only: the read-only path may be reordered with stores.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, T* to) {
  constexpr int kBytes = kAccessBytes<T, N>;
  using Word = typename WordOf<kBytes>::Type;
  PYDETOX_UNROLL
  for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kBytes; ++i) {
    const Word word = __ldg(reinterpret_cast<const Word*>(from) + i);
    memcpy(reinterpret_cast<char*>(to) + i * kBytes, &word, kBytes);
  }
}

// What the kernel itself writes, too: not by the read-only path.
template <int N, class T>
__device__ __forceinline__ void load_written(const T* from, T* to) {
  constexpr int kBytes = kAccessBytes<T, N>;
  using Word = typename WordOf<kBytes>::Type;
  PYDETOX_UNROLL
  for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kBytes; ++i) {
    const Word word = __ldcg(reinterpret_cast<const Word*>(from) + i);
    memcpy(reinterpret_cast<char*>(to) + i * kBytes, &word, kBytes);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const T* from) {
  constexpr int kBytes = kAccessBytes<T, N>;
  using Word = typename WordOf<kBytes>::Type;
  PYDETOX_UNROLL
  for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kBytes; ++i) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(from) + i * kBytes, kBytes);
    __stwb(reinterpret_cast<Word*>(to) + i, word);
  }
}

// The compiler moves no access to memory past this point. Without it all loads of an unrolled loop
// may come first, and wait in more registers than there are.
__device__ __forceinline__ void stay_in_order() { asm volatile("" ::: "memory"); }

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(PYDETOX_EMULATOR)
  return static_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ uint4 pydetox_shared_memory[];
  return reinterpret_cast<T*>(pydetox_shared_memory);
#endif
}

}  // namespace pydetox::cuda

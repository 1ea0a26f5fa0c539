#pragma once

// PYDETOX_HD marks a function that host and device share.
//
// On the host such a function is always inlined: the CPU kernels are compiled once per instruction
// set, and an out-of-line copy of an inline function compiled with AVX-512 flags could be the one
// the linker keeps for everybody.
#if defined(__CUDACC__)
#define PYDETOX_HD __host__ __device__ __forceinline__
#else
#define PYDETOX_HD inline __attribute__((always_inline))
#endif

// The same for a function of the host alone, which may call what is not marked.
#define PYDETOX_HOST inline __attribute__((always_inline))

// In front of a short loop: unroll it.
#if defined(__CUDA_ARCH__)
#define PYDETOX_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define PYDETOX_UNROLL
#else
#define PYDETOX_UNROLL _Pragma("GCC unroll 16")
#endif

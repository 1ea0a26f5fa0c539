// Runs CUDA kernels on the CPU: include this before a .cuh and call emulate().
//
// Every CUDA thread is a fiber; one fiber runs at a time, and control moves only at barriers, at
// warp operations and (with a seed) at global loads and stores. A seed shuffles the blocks and the
// order in which threads run, so that a missing barrier shows as a wrong result in some schedules.
// What cannot show here: memory ordering weaker than the host's, approximate intrinsics, inline
// PTX, speed.
//
// Covered: 3-D grids and blocks, static and dynamic shared memory, __syncthreads, __syncwarp and
// the shuffles. Dynamic shared memory is filled with NaNs before each block. Global memory is
// checked (bounds, alignment, inputs not written) and counted where a kernel uses __ldg, __ldcg and
// __stwb.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/common/macros.h"

namespace pydetox::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// What a real GPU would answer with an illegal access, a hang or silence.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A buffer in global memory that the kernel may touch.
struct Range {
  std::string name;
  const void* begin;
  std::size_t bytes;
  bool writable;
};

struct Launch {
  std::string kernel;  // for messages
  Dim3 grid, block;
  std::size_t shared_bytes = 0;  // dynamic shared memory
  std::vector<Range> memory;
};

constexpr int kDropNone = 0;
constexpr int kDropAll = -1;

struct Schedule {
  std::uint64_t seed = 0;           // 0: blocks and threads in order, no preemption
  int dropped_barrier = kDropNone;  // source line of a __syncthreads to leave out, or kDropAll
  std::optional<std::int64_t> only_block;  // in launch order; negative: from the end
  std::size_t cache_bytes = 0;             // size of the modelled L2; 0: no cache
  bool dry = false;                        // launches are noted, nothing runs
};

struct Traffic {
  std::int64_t loads = 0, stores = 0;  // per thread, not per warp
  std::int64_t bytes_loaded = 0;       // requested by the threads
  std::int64_t bytes_stored = 0;       // requested by the threads
  std::int64_t dram_bytes_read = 0;    // 32-byte sectors that missed a fully associative LRU cache
  std::int64_t blocks = 0, threads = 0, shared_bytes = 0;  // of the launch
  std::vector<int> barriers;  // source lines of the __syncthreads met, sorted
};

// Runs kernel() once per thread of the grid. Throws KernelError; not re-entrant, one host thread at
// a time.
Traffic emulate(const Launch& launch, const Schedule& schedule,
                const std::function<void()>& kernel);

// Called from within a kernel. A line names the call site in messages.
[[noreturn]] void fail(const std::string& what);  // KernelError with kernel, block and thread
void on_load(const void* address, std::size_t bytes);
void on_store(const void* address, std::size_t bytes);
void block_barrier(int line);
void warp_barrier(unsigned mask, int line);
void* shared_memory();        // the dynamic kind
std::uint64_t* warp_slots();  // one word per lane of the caller's warp
unsigned lane();

template <class T>
T exchange(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle moves at most 8 bytes");
  std::memcpy(warp_slots() + lane(), &value, sizeof(T));
  warp_barrier(mask, line);
  if (!(mask >> source & 1u)) {
    fail("line " + std::to_string(line) + ": shuffle reads lane " + std::to_string(source) +
         ", which is not in its mask");
  }
  T result;
  std::memcpy(&result, warp_slots() + source, sizeof(T));
  warp_barrier(mask, line);  // nobody overwrites a slot that is still to be read
  return result;
}

}  // namespace pydetox::emulator

// Unrolled, the kernels would only take longer to compile here.
#undef PYDETOX_UNROLL
#define PYDETOX_UNROLL

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

inline pydetox::emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
T __ldg(const T* address) {
  pydetox::emulator::on_load(address, sizeof(T));
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return __ldg(address);
}

template <class T>
void __stwb(T* address, T value) {
  pydetox::emulator::on_store(address, sizeof(T));
  *address = value;
}

inline void __syncthreads(int line = __builtin_LINE()) { pydetox::emulator::block_barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  pydetox::emulator::warp_barrier(mask, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return pydetox::emulator::exchange(mask, value, static_cast<unsigned>(source) % 32, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int line = __builtin_LINE()) {
  return pydetox::emulator::exchange(
      mask, value, pydetox::emulator::lane() ^ static_cast<unsigned>(flipped), line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned self = pydetox::emulator::lane();
  return pydetox::emulator::exchange(mask, value, self + delta < 32 ? self + delta : self, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned self = pydetox::emulator::lane();
  return pydetox::emulator::exchange(mask, value, self >= delta ? self - delta : self, line);
}

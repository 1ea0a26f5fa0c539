// Kernels that test the emulator itself: one that is right, and every fault that it must report.

#include "csrc/emulator/module.h"

namespace py = pybind11;

namespace pydetox::emulator {
namespace {

// out[block] = sum of the block's part of x: shuffles inside a warp, static shared memory and a
// barrier across warps.
__global__ void block_sum(const float* x, float* out) {
  __shared__ float of_warp[32];
  float sum = __ldg(x + blockIdx.x * blockDim.x + threadIdx.x);
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += of_warp[w];
    __stwb(out + blockIdx.x, sum);
  }
}

// out[i] = x[i] of the lane that each kind of shuffle names, one row per kind.
__global__ void shuffles(const float* x, float* out) {
  const unsigned all = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x);
  const float value = __ldg(x + lane);
  __stwb(out + lane, __shfl_sync(all, value, 5));
  __stwb(out + 32 + lane, __shfl_xor_sync(all, value, 3));
  __stwb(out + 64 + lane, __shfl_up_sync(all, value, 2));
  __stwb(out + 96 + lane, __shfl_down_sync(all, value, 2));
}

__global__ void faulty(const std::string& fault, const float* x, float* out) {
  const unsigned thread = threadIdx.x;
  float* shared = static_cast<float*>(shared_memory());
  if (fault == "barrier in a branch" && thread < 7) __syncthreads();
  if (fault == "two barriers") {
    if (thread % 2 == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (fault == "early return") {
    if (thread == 3) return;
    __syncthreads();
  }
  if (fault == "partial warp" && thread != 9) __syncwarp();
  if (fault == "shuffle from outside" && thread < 4) __shfl_sync(0xfu, 1.0f, 6);
  if (fault == "load past the end") __ldg(x + gridDim.x * blockDim.x + thread);
  if (fault == "store to an input") __stwb(const_cast<float*>(x) + thread, 1.0f);
  if (fault == "misaligned") __ldg(reinterpret_cast<const uint4*>(x + 1));
  if (fault == "shared overflow") shared[blockDim.x] = 1;
  if (fault == "uninitialised shared") __stwb(out + blockIdx.x, shared[thread]);
}

template <class Kernel>
Traffic run(const char* name, const py::array_t<float>& x, py::array_t<float>& out, int threads,
            const Schedule& schedule, const Kernel& kernel) {
  Launch launch;
  launch.kernel = name;
  launch.grid.x = static_cast<unsigned>(x.size() / threads);
  launch.block.x = static_cast<unsigned>(threads);
  launch.shared_bytes = static_cast<std::size_t>(threads) * sizeof(float);
  launch.memory = {range_of("x", x, false), range_of("out", out, true)};
  const float* in = x.data();
  float* result = out.mutable_data();
  return emulate(launch, schedule, [&] { kernel(in, result); });
}

}  // namespace

void bind_self_test(py::module_& module) {
  using Array = py::array_t<float>;
  module.def("block_sum", [](const Array& x, Array& out, int threads, const Schedule& schedule) {
    return run("block_sum", x, out, threads, schedule, block_sum);
  });
  module.def("shuffles", [](const Array& x, Array& out, const Schedule& schedule) {
    return run("shuffles", x, out, 32, schedule, shuffles);
  });
  module.def("faulty", [](const std::string& fault, const Array& x, Array& out, int threads,
                          const Schedule& schedule) {
    return run("faulty", x, out, threads, schedule,
               [&](const float* in, float* result) { faulty(fault, in, result); });
  });
}

}  // namespace pydetox::emulator

#pragma once

// Where an operator runs. Every register.cpp is compiled once for each backend: for the CPU, for
// CUDA (PYDETOX_CUDA) and for the emulator (PYDETOX_EMULATOR), which runs the CUDA code on tensors
// of the CPU. `run` functions of parameters have one signature everywhere: int run_x(const Params&,
// void* stream); 0, or an error of CUDA.

#include <string>

#include "csrc/common/check.h"

#if defined(PYDETOX_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace pydetox {

#if defined(PYDETOX_CUDA) || defined(PYDETOX_EMULATOR)
constexpr bool kRunsCuda = true;
#else
constexpr bool kRunsCuda = false;
#endif

#if defined(PYDETOX_EMULATOR)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Params, which is deduced from the function alone.
template <class T>
struct IdentityOf {
  using Type = T;
};
template <class T>
using Identity = typename IdentityOf<T>::Type;

#if defined(PYDETOX_CUDA)
// csrc/common/error.cu
const char* error_string(int error);

// The device of `on`, current while this exists, and its current stream.
class Place {
 public:
  explicit Place(const Tensor& on) : guard_(on.get_device_index()) {
    // Compared with 0, and not with torch's macro, whose name differs between torch 2.10 and 2.14.
    if (aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream_) != 0)
      throw std::runtime_error("torch gives no current CUDA stream");
  }
  // run_x(params, stream), which must succeed.
  template <class Params>
  void run(int (*run_x)(const Params&, void*), const Identity<Params>& params,
           const char* name) const {
    const int error = run_x(params, stream_);
    if (error != 0) throw std::runtime_error(std::string(name) + ": " + error_string(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#else
class Place {
 public:
  explicit Place(const Tensor&) {}
  template <class Params>
  void run(int (*run_x)(const Params&, void*), const Identity<Params>& params,
           const char* name) const {
    if (run_x(params, nullptr) != 0) throw std::runtime_error(std::string(name) + ": not launched");
  }
};
#endif

}  // namespace pydetox

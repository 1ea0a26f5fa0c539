// Picks the translation unit (cuda_*.cu) that has the kernels of a call's types.

#include "csrc/stamp_triggers/core.h"

namespace pydetox {
namespace cuda {

template <class T, class Output>
int run_stamp_forward_as(const StampForwardParams& params, void* stream);
template <class T, class Gradient>
int run_stamp_backward_as(const StampBackwardParams& params, void* stream);

}  // namespace cuda

namespace {

constexpr int kNoSuchKernel = 1;  // cudaErrorInvalidValue

}  // namespace

int run_stamp_forward(const StampForwardParams& params, void* stream) {
  int error = kNoSuchKernel;
  with_float_types(params.compute_dtype, params.output_dtype, [&](auto compute, auto output) {
    using T = typename decltype(compute)::Type;
    error = cuda::run_stamp_forward_as<T, typename decltype(output)::Type>(params, stream);
  });
  return error;
}

int run_stamp_backward(const StampBackwardParams& params, void* stream) {
  int error = kNoSuchKernel;
  with_float_types(params.compute_dtype, params.gradient_dtype, [&](auto compute, auto gradient) {
    using T = typename decltype(compute)::Type;
    error = cuda::run_stamp_backward_as<T, typename decltype(gradient)::Type>(params, stream);
  });
  return error;
}

}  // namespace pydetox

#include "csrc/weight_matmul/core.h"

namespace pydetox {
namespace cuda {

// cuda_left.cu, cuda_right.cu
int run_left(const MatmulParams& params, void* stream);
int run_right(const MatmulParams& params, void* stream);

}  // namespace cuda

int run_matmul(const MatmulParams& params, void* stream) {
  return params.left ? cuda::run_left(params, stream) : cuda::run_right(params, stream);
}

}  // namespace pydetox

#include <cuda_runtime_api.h>

namespace pydetox {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pydetox

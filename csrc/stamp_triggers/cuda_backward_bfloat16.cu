#include "csrc/stamp_triggers/launch.cuh"

namespace pydetox::cuda {

template int run_stamp_backward_as<float, BFloat16>(const StampBackwardParams&, void*);

}  // namespace pydetox::cuda

#include "csrc/stamp_triggers/launch.cuh"

namespace pydetox::cuda {

template int run_stamp_forward_as<float, BFloat16>(const StampForwardParams&, void*);

}  // namespace pydetox::cuda

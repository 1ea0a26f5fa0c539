#include "csrc/stamp_triggers/launch.cuh"

namespace pydetox::cuda {

template int run_stamp_forward_as<float, float>(const StampForwardParams&, void*);

}  // namespace pydetox::cuda

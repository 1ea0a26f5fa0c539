#include "csrc/stamp_triggers/launch.cuh"

namespace pydetox::cuda {

template int run_stamp_backward_as<double, double>(const StampBackwardParams&, void*);

}  // namespace pydetox::cuda

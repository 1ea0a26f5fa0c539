#include "csrc/cpu/capability.h"
#include "csrc/cpu/weights.h"

namespace pydetox::cpu {

// Each defined by csrc/cpu/weights_kernels.cpp, compiled with that instruction set's flags.
namespace scalar {
extern const WeightKernels kWeightKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const WeightKernels kWeightKernels;
}
namespace avx512 {
extern const WeightKernels kWeightKernels;
}
#ifdef PYDETOX_TEST_KERNELS
namespace avx2_wide {
extern const WeightKernels kWeightKernels;
}
#endif
#endif

const WeightKernels& weight_kernels() {
  switch (capability()) {
#ifdef __x86_64__
    case Capability::kAvx2:
      return avx2::kWeightKernels;
    case Capability::kAvx512:
      return avx512::kWeightKernels;
#ifdef PYDETOX_TEST_KERNELS
    case Capability::kAvx2Wide:
      return avx2_wide::kWeightKernels;
#endif
#endif
    default:
      return scalar::kWeightKernels;
  }
}

}  // namespace pydetox::cpu

#include "csrc/cpu/capability.h"
#include "csrc/cpu/trigger_update.h"

namespace pydetox::cpu {

// Each defined by csrc/cpu/trigger_update_kernels.cpp, compiled with that instruction set's flags.
namespace scalar {
extern const TriggerUpdateKernels kTriggerUpdateKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const TriggerUpdateKernels kTriggerUpdateKernels;
}
namespace avx512 {
extern const TriggerUpdateKernels kTriggerUpdateKernels;
}
#ifdef PYDETOX_TEST_KERNELS
namespace avx2_wide {
extern const TriggerUpdateKernels kTriggerUpdateKernels;
}
#endif
#endif

const TriggerUpdateKernels& trigger_update_kernels() {
  switch (capability()) {
#ifdef __x86_64__
    case Capability::kAvx2:
      return avx2::kTriggerUpdateKernels;
    case Capability::kAvx512:
      return avx512::kTriggerUpdateKernels;
#ifdef PYDETOX_TEST_KERNELS
    case Capability::kAvx2Wide:
      return avx2_wide::kTriggerUpdateKernels;
#endif
#endif
    default:
      return scalar::kTriggerUpdateKernels;
  }
}

}  // namespace pydetox::cpu

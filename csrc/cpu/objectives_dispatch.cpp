#include <algorithm>

#include "csrc/cpu/capability.h"
#include "csrc/cpu/objectives.h"

namespace pydetox::cpu {

// Each defined by csrc/cpu/objectives_kernels.cpp, compiled with that instruction set's flags.
namespace scalar {
extern const ObjectiveKernels kObjectiveKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const ObjectiveKernels kObjectiveKernels;
}
namespace avx512 {
extern const ObjectiveKernels kObjectiveKernels;
}
#ifdef PYDETOX_TEST_KERNELS
namespace avx2_wide {
extern const ObjectiveKernels kObjectiveKernels;
}
#endif
#endif

const ObjectiveKernels& objective_kernels() {
  switch (capability()) {
#ifdef __x86_64__
    case Capability::kAvx2:
      return avx2::kObjectiveKernels;
    case Capability::kAvx512:
      return avx512::kObjectiveKernels;
#ifdef PYDETOX_TEST_KERNELS
    case Capability::kAvx2Wide:
      return avx2_wide::kObjectiveKernels;
#endif
#endif
    default:
      return scalar::kObjectiveKernels;
  }
}

RowTiling row_tiling(const ZeroShotParams& params, int64_t threads) {
  constexpr int64_t kItemBytes = 512 * 1024;
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t row_bytes = (params.classes + 2 * params.z.dim) * size_of(params.z.dtype);
  const int64_t most =
      std::max<int64_t>(1, kItemBytes / std::max<int64_t>(1, row_bytes * kGroupRows));
  RowTiling tiling{};
  tiling.groups = parts(params.z.rows(), kGroupRows);
  // As many for every thread, so that none waits for another.
  const int64_t rounds = parts(parts(tiling.groups, most), std::max<int64_t>(1, threads));
  tiling.items = std::min(tiling.groups, rounds * threads);
  return tiling;
}

}  // namespace pydetox::cpu

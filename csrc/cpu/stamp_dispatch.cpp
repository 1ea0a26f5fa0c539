#include <algorithm>

#include "csrc/cpu/capability.h"
#include "csrc/cpu/stamp.h"

namespace pydetox::cpu {

// Each defined by csrc/cpu/stamp_kernels.cpp, compiled with that instruction set's flags.
namespace scalar {
extern const StampKernels kStampKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const StampKernels kStampKernels;
}
namespace avx512 {
extern const StampKernels kStampKernels;
}
#ifdef PYDETOX_TEST_KERNELS
namespace avx2_wide {
extern const StampKernels kStampKernels;
}
#endif
#endif

const StampKernels& stamp_kernels() {
  switch (capability()) {
#ifdef __x86_64__
    case Capability::kAvx2:
      return avx2::kStampKernels;
    case Capability::kAvx512:
      return avx512::kStampKernels;
#ifdef PYDETOX_TEST_KERNELS
    case Capability::kAvx2Wide:
      return avx2_wide::kStampKernels;
#endif
#endif
    default:
      return scalar::kStampKernels;
  }
}

StampTiling stamp_tiling(const StampShape& shape, DType compute_dtype, int64_t threads) {
  constexpr int64_t kTileBytes = 256 * 1024;
  constexpr int64_t kLeastPixels = 16, kMostPixels = 1024, kItemsPerThread = 4;
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };

  const int64_t pixel_bytes =
      std::max<int64_t>(1, shape.images * shape.channels * size_of(compute_dtype));
  const int64_t wanted =
      std::clamp(kTileBytes / pixel_bytes / kLeastPixels * kLeastPixels, kLeastPixels, kMostPixels);
  StampTiling tiling{};
  tiling.tile_inner = std::max<int64_t>(1, std::min(shape.inner(), wanted));
  tiling.tile_groups = std::max<int64_t>(1, wanted / std::max<int64_t>(1, shape.inner()));
  tiling.inner_tiles = parts(shape.inner(), tiling.tile_inner);
  tiling.group_tiles = parts(shape.groups(), tiling.tile_groups);
  const int64_t tiles = std::max<int64_t>(1, tiling.inner_tiles * tiling.group_tiles);
  const int64_t blocks = std::clamp<int64_t>(parts(threads * kItemsPerThread, tiles), 1,
                                             std::max<int64_t>(1, shape.triggers));
  tiling.block_triggers = std::max<int64_t>(1, parts(shape.triggers, blocks));
  tiling.trigger_blocks = parts(shape.triggers, tiling.block_triggers);
  return tiling;
}

}  // namespace pydetox::cpu

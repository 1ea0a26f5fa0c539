// Stamping on the CPU: tiles, shared out over threads.

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "csrc/common/cpu_kernels.h"
#include "csrc/stamp_triggers/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(StampKernels, stamp_kernels, kStampKernels)

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

namespace pydetox {
namespace {

// Over the items of a problem of this shape.
template <class Params>
int run(void (*kernel)(const Params&, const cpu::StampTiling&, int64_t, int64_t),
        const Params& params, const StampShape& shape) {
  const auto tiling =
      cpu::stamp_tiling(shape, params.compute_dtype, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, tiling.items(), 1, [&](int64_t begin, int64_t end) {
    kernel(params, tiling, begin, end);
  });
  return 0;
}

}  // namespace

int run_stamp_forward(const StampForwardParams& params, void*) {
  const auto& kernels = cpu::stamp_kernels();
  if (params.crop.corners == nullptr) return run(kernels.forward, params, params.shape);
  if (!params.only_box) run(kernels.clean, params, params.shape);
  return run(kernels.forward_box, params, params.crop.box(params.shape));
}

int run_stamp_backward(const StampBackwardParams& params, void*) {
  const auto& kernels = cpu::stamp_kernels();
  if (params.crop.corners == nullptr) return run(kernels.backward, params, params.shape);
  return run(kernels.backward_box, params, params.crop.box(params.shape));
}

}  // namespace pydetox

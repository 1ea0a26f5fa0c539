#include "csrc/common/launcher.h"
#include "csrc/mix_tokens/launch.cuh"

namespace pydetox {

int run_top_swaps(const SwapParams& params, void* stream) {
  return cuda::with_launcher(
      stream, [&](const auto& launch) { return cuda::launch_top_swaps(params, launch); });
}

int64_t swap_slices(const TokenTable& table, int64_t rows, int64_t) {
  return cuda::slices_of(table, rows);
}

}  // namespace pydetox

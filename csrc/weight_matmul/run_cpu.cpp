// Products with a thin matrix on the CPU: parts of the results, shared out over threads.

#include <algorithm>
#include <vector>

#include "csrc/common/cpu_kernels.h"
#include "csrc/common/share_out.h"
#include "csrc/weight_matmul/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(MatmulKernels, matmul_kernels, kMatmulKernels)

}  // namespace pydetox::cpu

namespace pydetox {
namespace {

// Elements that a unit of a left product reads, about; as many columns side by side as that allows,
// so that memory is read in longer stretches.
constexpr int64_t kLeftUnit = 1 << 20;

// The parts that the products are computed in.
std::vector<cpu::MatmulUnit> matmul_units(const MatmulParams& params) {
  std::vector<cpu::MatmulUnit> units;
  for (int64_t i = 0; i < params.count; ++i) {
    const MatmulTask& task = params.tasks[i];
    if (task.width == 0) continue;
    const int64_t size = params.left ? task.columns : task.rows;   // split up
    const int64_t depth = params.left ? task.rows : task.columns;  // summed
    const int64_t runs =
        params.left ? std::clamp<int64_t>(kLeftUnit / (kRun * (depth + 1)), 1, 4) : 1;
    for (int64_t first = 0; first < size; first += runs * kRun) {
      const int64_t count = std::min(runs * kRun, size - first);
      units.push_back({i, first, count});
    }
  }
  return units;
}

}  // namespace

int run_matmul(const MatmulParams& params, void*) {
  const auto units = matmul_units(params);
  cpu::share_out(static_cast<int64_t>(units.size()), [&](int64_t begin, int64_t end) {
    cpu::matmul_kernels().matmul(params, units.data(), begin, end);
  });
  return 0;
}

}  // namespace pydetox

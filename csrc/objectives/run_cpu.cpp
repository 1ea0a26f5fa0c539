// The objectives on the CPU: triggers or groups of rows, shared out over threads.

#include <algorithm>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "csrc/common/cpu_kernels.h"
#include "csrc/objectives/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(ObjectiveKernels, objective_kernels, kObjectiveKernels)

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

namespace pydetox {
namespace {

// Elements of embeddings that are worth a thread of their own (as many as torch gives one: they
// take some 10 us, waking a thread takes less), and products of them with a head.
constexpr int64_t kGrainElements = 1 << 15, kGrainProducts = 1 << 21;

int64_t grain(const Embeddings& z) {
  const int64_t each = z.images * z.dim;
  return each > kGrainElements ? 1 : kGrainElements / (each > 0 ? each : 1) + 1;
}

template <class T>
void mean_of_rows(const ZeroShotParams& p) {
  const auto count = static_cast<double>(p.z.images);
  for (int64_t k = 0; k < p.z.triggers; ++k) {
    double loss = 0;
    int64_t hits = 0;
    for (int64_t row = k * p.z.images; row < (k + 1) * p.z.images; ++row) {
      loss += p.row_losses[row];
      hits += p.row_hits[row];
    }
    static_cast<T*>(p.loss)[k] = static_cast<T>(loss / count);
    static_cast<T*>(p.success)[k] = static_cast<T>(static_cast<double>(hits) / count);
  }
}

template <class T>
void scale(const ScaleParams& p) {
  const T* factors = static_cast<const T*>(p.factors);
  const T* from = static_cast<const T*>(p.from);
  T* to = static_cast<T*>(p.to);
  for (int64_t k = 0; k < p.triggers; ++k) {
    for (int64_t i = k * p.count; i < (k + 1) * p.count; ++i) to[i] = factors[k] * from[i];
  }
}

}  // namespace

int run_collapse(const CollapseParams& params, void*) {
  const auto& kernels = cpu::objective_kernels();
  const auto kernel = params.gradient == nullptr ? kernels.collapse : kernels.collapse_gradient;
  torch::stable::parallel_for(0, params.z.triggers, grain(params.z),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return 0;
}

int run_zero_shot(const ZeroShotParams& params, void*) {
  const int64_t products = params.z.rows() * params.classes * params.z.dim;
  const bool alone = products < 2 * kGrainProducts;
  const auto tiling = cpu::row_tiling(params, alone ? 1 : torch::stable::get_num_threads());
  torch::stable::parallel_for(0, tiling.items, alone ? tiling.items + 1 : 1,
                              [&](int64_t begin, int64_t end) {
                                cpu::objective_kernels().zero_shot(params, tiling, begin, end);
                              });
  with_type<float, double>(params.z.dtype,
                           [&](auto type) { mean_of_rows<typename decltype(type)::Type>(params); });
  return 0;
}

int run_scale(const ScaleParams& params, void*) {
  with_type<float, double>(params.dtype,
                           [&](auto type) { scale<typename decltype(type)::Type>(params); });
  return 0;
}

int64_t max_zero_shot_dim(DType) { return std::numeric_limits<int64_t>::max(); }

}  // namespace pydetox

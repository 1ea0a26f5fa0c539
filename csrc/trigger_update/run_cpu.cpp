// The update on the CPU: chunks of masks and patterns, shared out over threads.

#include <torch/csrc/stable/ops.h>

#include "csrc/common/cpu_kernels.h"
#include "csrc/trigger_update/cpu.h"

namespace pydetox::cpu {

PYDETOX_DEFINE_KERNELS(TriggerUpdateKernels, trigger_update_kernels, kTriggerUpdateKernels)

}  // namespace pydetox::cpu

namespace pydetox {
namespace {

double number(const PerTrigger& numbers, int64_t k) {
  if (numbers.data == nullptr) return 0;
  return numbers.dtype == DType::kFloat64
             ? static_cast<const double*>(numbers.data)[k]
             : static_cast<double>(static_cast<const float*>(numbers.data)[k]);
}

// The second phase for one trigger.
void begin_step(const TriggerUpdateParams& p, int64_t k) {
  if (p.active[k] == 0) {
    p.norms[k] = not_a_number();
    p.plans[k] = TriggerStep{};
    return;
  }
  double norm = 0;
  const int64_t chunks = p.mask_chunks();
  for (int64_t c = 0; c < chunks; ++c) norm += p.partials[k * chunks + c];
  const bool best = p.eligible != nullptr && p.eligible[k] != 0 && norm < p.best_norm[k];
  p.norms[k] = norm;
  p.steps[k] += 1;
  p.plans[k] = plan_step(p, p.steps[k], number(p.cost, k), number(p.learning_rate, k),
                         number(p.variation, k), best);
  if (best) p.best_norm[k] = norm;
}

// Chunks that are worth a thread of their own.
constexpr int64_t kGrain = 4;

}  // namespace

int run_trigger_update(const TriggerUpdateParams& params, void*) {
  const auto& kernels = cpu::trigger_update_kernels();
  torch::stable::parallel_for(
      0, params.triggers * params.mask_chunks(), kGrain,
      [&](int64_t begin, int64_t end) { kernels.mask(params, begin, end); });
  for (int64_t k = 0; k < params.triggers; ++k) begin_step(params, k);
  torch::stable::parallel_for(
      0, params.triggers * params.chunks(), kGrain,
      [&](int64_t begin, int64_t end) { kernels.move(params, begin, end); });
  return 0;
}

}  // namespace pydetox

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cpu/trigger_update.h"
#include "csrc/ops/trigger_update_arguments.h"

namespace pydetox::ops {
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

Tensor trigger_update(Tensor mask_logits, Tensor pattern_logits, const Tensor& mask_gradient,
                      const Tensor& pattern_gradient, Tensor mask_first, Tensor pattern_first,
                      Tensor mask_second, Tensor pattern_second, const Tensor& cost,
                      const Tensor& learning_rate, std::optional<Tensor> variation, Tensor steps,
                      const Tensor& active, std::optional<Tensor> best_mask,
                      std::optional<Tensor> best_pattern, std::optional<Tensor> best_norm,
                      std::optional<Tensor> eligible, double beta1, double beta2, double epsilon) {
  TriggerUpdate call({mask_logits, pattern_logits, mask_gradient, pattern_gradient, mask_first,
                      pattern_first, mask_second, pattern_second, cost, learning_rate, variation,
                      steps, active, best_mask, best_pattern, best_norm, eligible},
                     beta1, beta2, epsilon);
  const auto& params = call.params;
  const auto& kernels = cpu::trigger_update_kernels();
  torch::stable::parallel_for(
      0, params.triggers * params.mask_chunks(), kGrain,
      [&](int64_t begin, int64_t end) { kernels.mask(params, begin, end); });
  for (int64_t k = 0; k < params.triggers; ++k) begin_step(params, k);
  torch::stable::parallel_for(
      0, params.triggers * params.chunks(), kGrain,
      [&](int64_t begin, int64_t end) { kernels.move(params, begin, end); });
  return call.norms;
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CPU, library) {
  library.impl("trigger_update", TORCH_BOX(&pydetox::ops::trigger_update));
}

#include "csrc/common/register.h"

#include "csrc/common/place.h"
#include "csrc/trigger_update/arguments.h"

namespace pydetox {
namespace {

Tensor trigger_update(Tensor mask_logits, Tensor pattern_logits, const Tensor& mask_gradient,
                      const Tensor& pattern_gradient, Tensor mask_first, Tensor pattern_first,
                      Tensor mask_second, Tensor pattern_second, const Tensor& cost,
                      const Tensor& learning_rate, std::optional<Tensor> variation, Tensor steps,
                      const Tensor& active, std::optional<Tensor> best_mask,
                      std::optional<Tensor> best_pattern, std::optional<Tensor> best_norm,
                      std::optional<Tensor> eligible, double beta1, double beta2, double epsilon) {
  const Place place(mask_logits);
  TriggerUpdate call({mask_logits, pattern_logits, mask_gradient, pattern_gradient, mask_first,
                      pattern_first, mask_second, pattern_second, cost, learning_rate, variation,
                      steps, active, best_mask, best_pattern, best_norm, eligible},
                     beta1, beta2, epsilon);
  place.run(run_trigger_update, call.params, "trigger_update");
  return call.norms;
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // One step of Adam for K triggers, in place: logits, moments, steps where active; the best where
  // eligible and smaller. -> float64 [K], |mask|_1 before the step
  library.def(
      "trigger_update(Tensor(a!) mask_logits, Tensor(b!) pattern_logits, Tensor mask_gradient, "
      "Tensor pattern_gradient, Tensor(c!) mask_first, Tensor(d!) pattern_first, "
      "Tensor(e!) mask_second, Tensor(f!) pattern_second, Tensor cost, Tensor learning_rate, "
      "Tensor? total_variation, Tensor(g!) steps, Tensor active, Tensor(h!)? best_mask, "
      "Tensor(i!)? best_pattern, Tensor(j!)? best_norm, Tensor? eligible, float beta1, "
      "float beta2, float epsilon) -> Tensor");
}

PYDETOX_KERNELS(library) { library.impl("trigger_update", TORCH_BOX(&pydetox::trigger_update)); }

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/launch.h"
#include "csrc/ops/cuda_place.h"
#include "csrc/ops/trigger_update_arguments.h"

namespace pydetox::ops {
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
  check_launch(cuda::trigger_update(call.params, place.stream), "trigger_update");
  return call.norms;
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CUDA, library) {
  library.impl("trigger_update", TORCH_BOX(&pydetox::ops::trigger_update));
}

#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/launch.h"
#include "csrc/ops/check.h"
#include "csrc/ops/stamp_arguments.h"

namespace pydetox::ops {
namespace {

// Launches on the tensors' device and its current stream.
template <class Params>
void run(int (*launch)(const Params&, void*), const Params& params, const Tensor& on,
         const char* name) {
  const auto device = on.get_device_index();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launch(params, stream);
  check(error == 0, name, ": ", cuda::error_string(error));
}

Tensor stamp_triggers(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
                      std::vector<double> mean, std::vector<double> std, int64_t patch_size,
                      ScalarType dtype, std::optional<Tensor> corners) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, dtype);
  run(cuda::stamp_forward, call.params, images, "stamp_triggers");
  return call.output;
}

std::tuple<Tensor, Tensor> stamp_triggers_backward(const Tensor& gradient, const Tensor& images,
                                                   const Tensor& mask_logits,
                                                   const Tensor& pattern_logits,
                                                   std::vector<double> mean,
                                                   std::vector<double> std, int64_t patch_size,
                                                   std::optional<Tensor> corners) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners});
  run(cuda::stamp_backward, call.params, images, "stamp_triggers_backward");
  return {call.mask_logits_gradient, call.pattern_logits_gradient};
}

void stamp_triggers_out(const Tensor& images, const Tensor& mask_logits,
                        const Tensor& pattern_logits, std::vector<double> mean,
                        std::vector<double> std, int64_t patch_size, Tensor out,
                        std::optional<Tensor> corners, bool only_box) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  StampForward call({images, mask_logits, pattern_logits, mean, std, patch_size, corners}, out,
                    only_box);
  run(cuda::stamp_forward, call.params, images, "stamp_triggers");
}

void stamp_triggers_backward_out(const Tensor& gradient, const Tensor& images,
                                 const Tensor& mask_logits, const Tensor& pattern_logits,
                                 std::vector<double> mean, std::vector<double> std,
                                 int64_t patch_size, Tensor mask_logits_gradient,
                                 Tensor pattern_logits_gradient, std::optional<Tensor> corners) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  StampBackward call(gradient,
                     {images, mask_logits, pattern_logits, mean, std, patch_size, corners},
                     mask_logits_gradient, pattern_logits_gradient);
  run(cuda::stamp_backward, call.params, images, "stamp_triggers_backward");
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CUDA, library) {
  library.impl("stamp_triggers", TORCH_BOX(&pydetox::ops::stamp_triggers));
  library.impl("stamp_triggers_backward", TORCH_BOX(&pydetox::ops::stamp_triggers_backward));
  library.impl("stamp_triggers_out", TORCH_BOX(&pydetox::ops::stamp_triggers_out));
  library.impl("stamp_triggers_backward_out",
               TORCH_BOX(&pydetox::ops::stamp_triggers_backward_out));
}

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/launch.h"
#include "csrc/ops/check.h"
#include "csrc/ops/cuda_place.h"
#include "csrc/ops/objectives_arguments.h"

namespace pydetox::ops {
namespace {

Tensor embedding_collapse(const Tensor& z) {
  const Place place(z);
  Collapse call(z);
  check_launch(cuda::embedding_collapse(call.params, place.stream), "embedding_collapse");
  return call.cosine;
}

Tensor embedding_collapse_backward(const Tensor& gradient, const Tensor& z) {
  const Place place(z);
  CollapseBackward call(gradient, z);
  check_launch(cuda::embedding_collapse(call.params, place.stream), "embedding_collapse_backward");
  return call.result;
}

std::tuple<Tensor, Tensor, Tensor> zero_shot_loss(const Tensor& z, const Tensor& head,
                                                  const Tensor& targets, double logit_scale,
                                                  bool with_gradient) {
  const Place place(z);
  ZeroShot call(z, head, targets, logit_scale, with_gradient);
  const int64_t most = cuda::max_zero_shot_dim(call.params.z.dtype);
  check(call.params.z.dim <= most, "zero_shot_loss: at most ", most,
        " dimensions on CUDA for this dtype, not z ", ShapeOf{z});
  check_launch(cuda::zero_shot_loss(call.params, place.stream), "zero_shot_loss");
  return {call.loss, call.success, call.gradient};
}

Tensor zero_shot_loss_backward(const Tensor& gradient, const Tensor& z,
                               const Tensor& embeddings_gradient) {
  const Place place(z);
  ScaledTriggers call(gradient, z, embeddings_gradient);
  check_launch(cuda::scale_triggers(call.params, place.stream), "zero_shot_loss_backward");
  return call.result;
}

}  // namespace
}  // namespace pydetox::ops

STABLE_TORCH_LIBRARY_IMPL(pydetox, CUDA, library) {
  library.impl("embedding_collapse", TORCH_BOX(&pydetox::ops::embedding_collapse));
  library.impl("embedding_collapse_backward",
               TORCH_BOX(&pydetox::ops::embedding_collapse_backward));
  library.impl("zero_shot_loss", TORCH_BOX(&pydetox::ops::zero_shot_loss));
  library.impl("zero_shot_loss_backward", TORCH_BOX(&pydetox::ops::zero_shot_loss_backward));
}

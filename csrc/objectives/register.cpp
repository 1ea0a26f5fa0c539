#include "csrc/common/register.h"

#include "csrc/common/place.h"
#include "csrc/objectives/arguments.h"

namespace pydetox {
namespace {

Tensor embedding_collapse(const Tensor& z) {
  const Place place(z);
  Collapse call(z);
  place.run(run_collapse, call.params, "embedding_collapse");
  return call.cosine;
}

Tensor embedding_collapse_backward(const Tensor& gradient, const Tensor& z) {
  const Place place(z);
  CollapseBackward call(gradient, z);
  place.run(run_collapse, call.params, "embedding_collapse_backward");
  return call.result;
}

std::tuple<Tensor, Tensor, Tensor> zero_shot_loss(const Tensor& z, const Tensor& head,
                                                  const Tensor& targets, double logit_scale,
                                                  bool with_gradient) {
  const Place place(z);
  ZeroShot call(z, head, targets, logit_scale, with_gradient);
  const ZeroShotParams& params = call.params;
  const int64_t most = max_zero_shot_dim(params.z.dtype);
  check(params.z.dim <= most, "zero_shot_loss: at most ", most,
        " dimensions on CUDA for this dtype, found z ", ShapeOf{z});
  // A look at a GPU's memory would wait for it: there the loss is NaN.
  for (int64_t k = 0; !kRunsCuda && k < params.z.triggers; ++k) {
    check(params.targets[k] >= 0 && params.targets[k] < params.classes,
          "zero_shot_loss: targets must be from 0 to ", params.classes - 1, ", found ",
          params.targets[k]);
  }
  place.run(run_zero_shot, params, "zero_shot_loss");
  return {call.loss, call.success, call.gradient};
}

Tensor zero_shot_loss_backward(const Tensor& gradient, const Tensor& z,
                               const Tensor& embeddings_gradient) {
  const Place place(z);
  ScaledTriggers call(gradient, z, embeddings_gradient);
  place.run(run_scale, call.params, "zero_shot_loss_backward");
  return call.result;
}

}  // namespace
}  // namespace pydetox

PYDETOX_SCHEMAS(library) {
  // z [K,B,D] -> [K]
  library.def("embedding_collapse(Tensor z) -> Tensor");
  library.def("embedding_collapse_backward(Tensor gradient, Tensor z) -> Tensor");
  // head [C,D], targets int64 [K] -> loss [K], success [K], and with_gradient that of loss[k] by
  // z[k], [K,B,D]; else [0].
  library.def(
      "zero_shot_loss(Tensor z, Tensor head, Tensor targets, float logit_scale, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor)");
  // gradient [K] of loss; z only says what the result depends on. -> gradient of z
  library.def(
      "zero_shot_loss_backward(Tensor gradient, Tensor z, Tensor embeddings_gradient) -> Tensor");
}

PYDETOX_KERNELS(library) {
  using namespace pydetox;
  library.impl("embedding_collapse", TORCH_BOX(&embedding_collapse));
  library.impl("embedding_collapse_backward", TORCH_BOX(&embedding_collapse_backward));
  library.impl("zero_shot_loss", TORCH_BOX(&zero_shot_loss));
  library.impl("zero_shot_loss_backward", TORCH_BOX(&zero_shot_loss_backward));
}

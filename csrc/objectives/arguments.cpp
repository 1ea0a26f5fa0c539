#include "csrc/objectives/arguments.h"

#include <cmath>

#include "csrc/common/tensors.h"

namespace pydetox {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

Embeddings checked_embeddings(const char* op, const Tensor& z) {
  const auto type = z.scalar_type();
  check(z.dim() == 3, op, ": z must be [K, B, D], found ", ShapeOf{z});
  check(type == ScalarType::Float || type == ScalarType::Double, op,
        ": z must be float32 or float64, found ", name_of(type));
  return {dtype_of(z), z.size(0), z.size(1), z.size(2), nullptr};
}

void check_upstream(const char* op, const Tensor& gradient, const Tensor& z) {
  check(has_sizes(gradient, {z.size(0)}) && gradient.scalar_type() == z.scalar_type(), op,
        ": gradient must be ", dtype_name(z), " [", z.size(0), "] for z ", ShapeOf{z}, ", found ",
        dtype_name(gradient), " ", ShapeOf{gradient});
  check_device(op, "gradient", gradient, "z", z);
}

}  // namespace

Collapse::Collapse(const Tensor& z) : cosine(z), z_(contiguous(z)), sums_(z), inverse_norms_(z) {
  params.z = checked_embeddings("embedding_collapse", z);
  check(params.z.images >= 2,
        "embedding_collapse: z must have at least 2 images for a pair, found ", ShapeOf{z});
  params.z.data = read(z_);
  cosine = new_empty(z, {params.z.triggers});
  params.cosine = written(cosine);
  sums_ = new_empty(z, {params.z.triggers, params.z.dim}, ScalarType::Double);
  params.sums = written<double>(sums_);
  inverse_norms_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.inverse_norms = written<double>(inverse_norms_);
}

CollapseBackward::CollapseBackward(const Tensor& gradient, const Tensor& z)
    : Collapse(z), result(z), gradient_(contiguous(gradient)) {
  check_upstream("embedding_collapse_backward", gradient, z);
  params.gradient = read(gradient_);
  result = new_empty(z, {params.z.triggers, params.z.images, params.z.dim});
  params.embeddings_gradient = written(result);
}

ZeroShot::ZeroShot(const Tensor& z, const Tensor& head, const Tensor& targets, double logit_scale,
                   bool with_gradient)
    : loss(z),
      success(z),
      gradient(z),
      z_(contiguous(z)),
      head_(contiguous(head)),
      targets_(contiguous(targets)),
      row_losses_(z),
      row_hits_(z),
      inverse_norms_(z) {
  constexpr const char* kOp = "zero_shot_loss";
  params.z = checked_embeddings(kOp, z);
  check(params.z.images >= 1, kOp, ": z must have at least 1 image, found ", ShapeOf{z});
  check(head.dim() == 2 && head.size(1) == params.z.dim && head.size(0) >= 1, kOp,
        ": head must be [C, ", params.z.dim, "], C at least 1, for z ", ShapeOf{z}, ", found ",
        ShapeOf{head});
  check(head.scalar_type() == z.scalar_type(), kOp, ": head must be ", dtype_name(z),
        " as z is, found ", dtype_name(head));
  check(has_sizes(targets, {params.z.triggers}) && targets.scalar_type() == ScalarType::Long, kOp,
        ": targets must be int64 [", params.z.triggers, "] for z ", ShapeOf{z}, ", found ",
        dtype_name(targets), " ", ShapeOf{targets});
  check_device(kOp, "head", head, "z", z);
  check_device(kOp, "targets", targets, "z", z);
  check(std::isfinite(logit_scale) && logit_scale > 0, kOp,
        ": logit_scale must be a positive number, found ", logit_scale);
  params.z.data = read(z_);
  params.classes = head.size(0);
  params.head = read(head_);
  params.targets = read<int64_t>(targets_);
  params.scale = logit_scale;
  loss = new_empty(z, {params.z.triggers});
  success = new_empty(z, {params.z.triggers});
  params.loss = written(loss);
  params.success = written(success);
  gradient = with_gradient ? new_empty(z, {params.z.triggers, params.z.images, params.z.dim})
                           : new_empty(z, {0});
  params.gradient = with_gradient ? written(gradient) : nullptr;
  row_losses_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.row_losses = written<double>(row_losses_);
  row_hits_ = new_empty(z, {params.z.rows()}, ScalarType::Byte);
  params.row_hits = written<uint8_t>(row_hits_);
  inverse_norms_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.inverse_norms = written<double>(inverse_norms_);
}

ScaledTriggers::ScaledTriggers(const Tensor& upstream, const Tensor& z, const Tensor& unscaled)
    : result(z), gradient_(contiguous(upstream)), embeddings_gradient_(contiguous(unscaled)) {
  constexpr const char* kOp = "zero_shot_loss_backward";
  const auto shape = checked_embeddings(kOp, z);
  check_upstream(kOp, upstream, z);
  check(has_sizes(unscaled, sizes_of(z)) && unscaled.scalar_type() == z.scalar_type(), kOp,
        ": embeddings_gradient must be ", dtype_name(z), " ", ShapeOf{z}, " as z is, found ",
        dtype_name(unscaled), " ", ShapeOf{unscaled});
  check_device(kOp, "embeddings_gradient", unscaled, "z", z);
  result = new_empty(z, {shape.triggers, shape.images, shape.dim});
  params = {shape.dtype,
            shape.triggers,
            shape.images * shape.dim,
            read(gradient_),
            read(embeddings_gradient_),
            written(result)};
}

}  // namespace pydetox

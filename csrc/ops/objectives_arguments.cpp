#include "csrc/ops/objectives_arguments.h"

#include <cmath>

#include <torch/csrc/stable/ops.h>

#include "csrc/ops/check.h"

namespace pydetox::ops {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

Embeddings checked_embeddings(const char* op, const Tensor& z) {
  const auto type = z.scalar_type();
  check(z.dim() == 3, op, ": z must be [K, B, D], not ", ShapeOf{z});
  check(type == ScalarType::Float || type == ScalarType::Double, op,
        ": z must be float32 or float64");
  return {type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32, z.size(0), z.size(1),
          z.size(2), nullptr};
}

void check_upstream(const char* op, const Tensor& gradient, const Tensor& z) {
  check(gradient.dim() == 1 && gradient.size(0) == z.size(0), op, ": gradient must be [K] for z ",
        ShapeOf{z}, ", not ", ShapeOf{gradient});
  check(gradient.scalar_type() == z.scalar_type() && gradient.device() == z.device(), op,
        ": gradient must have the dtype and the device of z");
}

}  // namespace

Collapse::Collapse(const Tensor& z) : cosine(z), z_(contiguous(z)), sums_(z), inverse_norms_(z) {
  params.z = checked_embeddings("embedding_collapse", z);
  check(params.z.images >= 2, "embedding_collapse: z must have at least 2 images for a pair, not ",
        ShapeOf{z});
  params.z.data = z_.const_data_ptr();
  cosine = new_empty(z, {params.z.triggers});
  params.cosine = cosine.mutable_data_ptr();
  sums_ = new_empty(z, {params.z.triggers, params.z.dim}, ScalarType::Double);
  params.sums = static_cast<double*>(sums_.mutable_data_ptr());
  inverse_norms_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.inverse_norms = static_cast<double*>(inverse_norms_.mutable_data_ptr());
}

CollapseBackward::CollapseBackward(const Tensor& gradient, const Tensor& z)
    : Collapse(z), result(z), gradient_(contiguous(gradient)) {
  check_upstream("embedding_collapse_backward", gradient, z);
  params.gradient = gradient_.const_data_ptr();
  result = new_empty(z, {params.z.triggers, params.z.images, params.z.dim});
  params.embeddings_gradient = result.mutable_data_ptr();
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
  check(params.z.images >= 1, kOp, ": z must have at least 1 image, not ", ShapeOf{z});
  check(head.dim() == 2 && head.size(1) == params.z.dim && head.size(0) >= 1, kOp,
        ": head must be [C, D], C at least 1, for z ", ShapeOf{z}, ", not ", ShapeOf{head});
  check(head.scalar_type() == z.scalar_type(), kOp, ": head must have the dtype of z");
  check(targets.dim() == 1 && targets.size(0) == params.z.triggers, kOp,
        ": targets must be [K] for z ", ShapeOf{z}, ", not ", ShapeOf{targets});
  check(targets.scalar_type() == ScalarType::Long, kOp, ": targets must be int64");
  check(head.device() == z.device() && targets.device() == z.device(), kOp,
        ": z, head and targets must be on one device");
  check(std::isfinite(logit_scale) && logit_scale > 0, kOp,
        ": logit_scale must be a positive number, not ", logit_scale);
  params.z.data = z_.const_data_ptr();
  params.classes = head.size(0);
  params.head = head_.const_data_ptr();
  params.targets = static_cast<const int64_t*>(targets_.const_data_ptr());
  params.scale = logit_scale;
  loss = new_empty(z, {params.z.triggers});
  success = new_empty(z, {params.z.triggers});
  params.loss = loss.mutable_data_ptr();
  params.success = success.mutable_data_ptr();
  gradient = with_gradient ? new_empty(z, {params.z.triggers, params.z.images, params.z.dim})
                           : new_empty(z, {0});
  params.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  row_losses_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.row_losses = static_cast<double*>(row_losses_.mutable_data_ptr());
  row_hits_ = new_empty(z, {params.z.rows()}, ScalarType::Byte);
  params.row_hits = static_cast<uint8_t*>(row_hits_.mutable_data_ptr());
  inverse_norms_ = new_empty(z, {params.z.rows()}, ScalarType::Double);
  params.inverse_norms = static_cast<double*>(inverse_norms_.mutable_data_ptr());
}

ScaledTriggers::ScaledTriggers(const Tensor& upstream, const Tensor& z, const Tensor& unscaled)
    : result(z), gradient_(contiguous(upstream)), embeddings_gradient_(contiguous(unscaled)) {
  constexpr const char* kOp = "zero_shot_loss_backward";
  const auto shape = checked_embeddings(kOp, z);
  check_upstream(kOp, upstream, z);
  check(unscaled.dim() == 3 && unscaled.size(0) == shape.triggers &&
            unscaled.size(1) == shape.images && unscaled.size(2) == shape.dim,
        kOp, ": embeddings_gradient must be ", ShapeOf{z}, " as z is, not ", ShapeOf{unscaled});
  check(unscaled.scalar_type() == z.scalar_type() && unscaled.device() == z.device(), kOp,
        ": embeddings_gradient must have the dtype and the device of z");
  result = new_empty(z, {shape.triggers, shape.images, shape.dim});
  params = {shape.dtype,
            shape.triggers,
            shape.images * shape.dim,
            gradient_.const_data_ptr(),
            embeddings_gradient_.const_data_ptr(),
            result.mutable_data_ptr()};
}

}  // namespace pydetox::ops

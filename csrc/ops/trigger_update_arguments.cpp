#include "csrc/ops/trigger_update_arguments.h"

#include <torch/csrc/stable/ops.h>

#include "csrc/ops/check.h"

namespace pydetox::ops {
namespace {

constexpr const char* kOp = "trigger_update";

struct Named {
  const char* name;
  Tensor tensor;
};

DType float_dtype(const Named& t) {
  const auto type = t.tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, kOp, ": ", t.name,
        " must be float32 or float64");
  return type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

void check_like(const Named& t, const Named& like) {
  check(same_sizes(t.tensor, like.tensor), kOp, ": ", t.name, " must be ", ShapeOf{like.tensor},
        " as ", like.name, " is, not ", ShapeOf{t.tensor});
  check(t.tensor.scalar_type() == like.tensor.scalar_type(), kOp, ": ", t.name,
        " must have the dtype of ", like.name);
}

void check_vector(const Named& t, int64_t triggers) {
  check(t.tensor.dim() == 1 && t.tensor.size(0) == triggers, kOp, ": ", t.name, " must be [",
        triggers, "], one for each trigger, not ", ShapeOf{t.tensor});
  check(t.tensor.is_contiguous(), kOp, ": ", t.name, " must be contiguous");
}

void check_type(const Named& t, ScalarType type, const char* name) {
  check(t.tensor.scalar_type() == type, kOp, ": ", t.name, " must be ", name);
}

int64_t element_bytes(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool:
      return 1;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

// What is written must be nobody else's memory. All but gradients are contiguous; of a strided
// gradient a copy is made before anything is written.
void check_apart(const Named& written, const Named& other) {
  const auto begin = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  const auto end = [&](const Tensor& t) {
    return begin(t) + static_cast<uintptr_t>(
                          t.is_contiguous() || t.numel() == 0 ? t.numel() * element_bytes(t) : 1);
  };
  check(begin(written.tensor) >= end(other.tensor) || begin(other.tensor) >= end(written.tensor),
        kOp, ": ", written.name, " must not share memory with ", other.name);
}

}  // namespace

TriggerUpdate::TriggerUpdate(const TriggerUpdateTensors& t, double beta1, double beta2,
                             double epsilon)
    : norms(torch::stable::new_empty(t.mask_logits, {t.cost.numel()}, ScalarType::Double)),
      tensors_(t),
      partials_(norms),
      plans_(norms),
      signs_(norms) {
  const Named mask{"mask_logits", t.mask_logits}, pattern{"pattern_logits", t.pattern_logits};
  params.dtype = float_dtype(mask);
  check(t.mask_logits.dim() == 3, kOp, ": mask_logits must be [K, H, W], not ",
        ShapeOf{t.mask_logits});
  check(t.pattern_logits.dim() == 4 && t.pattern_logits.size(0) == t.mask_logits.size(0) &&
            t.pattern_logits.size(2) == t.mask_logits.size(1) &&
            t.pattern_logits.size(3) == t.mask_logits.size(2),
        kOp, ": pattern_logits must be [K, C, H, W] for mask_logits ", ShapeOf{t.mask_logits},
        ", not ", ShapeOf{t.pattern_logits});
  check_type(pattern, t.mask_logits.scalar_type(), "of the dtype of mask_logits");
  params.triggers = t.mask_logits.size(0);
  params.channels = t.pattern_logits.size(1);
  params.height = t.mask_logits.size(1);
  params.width = t.mask_logits.size(2);

  std::vector<Named> written = {mask,
                                pattern,
                                {"mask_first", t.mask_first},
                                {"pattern_first", t.pattern_first},
                                {"mask_second", t.mask_second},
                                {"pattern_second", t.pattern_second}};
  const Named mask_gradient{"mask_gradient", t.mask_gradient};
  const Named pattern_gradient{"pattern_gradient", t.pattern_gradient};
  check_like(mask_gradient, mask);
  check_like(pattern_gradient, pattern);
  for (size_t i = 2; i < written.size(); ++i) {
    check_like(written[i], i % 2 == 0 ? mask : pattern);
  }

  std::vector<Named> vectors = {{"cost", t.cost}, {"learning_rate", t.learning_rate}};
  if (t.variation.has_value()) vectors.push_back({"total_variation", *t.variation});
  for (const auto& one : vectors) float_dtype(one);
  const Named steps{"steps", t.steps}, active{"active", t.active};
  check_type(steps, ScalarType::Long, "int64");
  check_type(active, ScalarType::Bool, "bool");
  vectors.push_back(active);
  written.push_back(steps);

  const bool best = t.best_mask.has_value();
  check(t.best_pattern.has_value() == best && t.best_norm.has_value() == best &&
            t.eligible.has_value() == best,
        kOp, ": best_mask, best_pattern, best_norm and eligible come together");
  if (best) {
    const Named best_mask{"best_mask", *t.best_mask};
    const Named best_pattern{"best_pattern", *t.best_pattern};
    const Named best_norm{"best_norm", *t.best_norm}, eligible{"eligible", *t.eligible};
    check_like(best_mask, mask);
    check_like(best_pattern, pattern);
    check_type(best_norm, ScalarType::Double, "float64");
    check_type(eligible, ScalarType::Bool, "bool");
    vectors.push_back(eligible);
    written.insert(written.end(), {best_mask, best_pattern, best_norm});
    check_vector(best_norm, params.triggers);
  }
  for (const auto& one : vectors) check_vector(one, params.triggers);
  check_vector(steps, params.triggers);
  check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, kOp, ": betas must be in [0, 1), not ",
        beta1, " and ", beta2);
  check(epsilon >= 0, kOp, ": epsilon must not be negative, not ", epsilon);

  std::vector<Named> all = written;
  all.insert(all.end(), {mask_gradient, pattern_gradient});
  all.insert(all.end(), vectors.begin(), vectors.end());
  for (const auto& one : all) {
    check(one.tensor.device() == t.mask_logits.device(), kOp, ": ", one.name,
          " and mask_logits must be on one device");
  }
  for (size_t i = 0; i < written.size(); ++i) {
    check(written[i].tensor.is_contiguous(), kOp, ": ", written[i].name, " must be contiguous");
    for (size_t j = 0; j < all.size(); ++j) {
      if (i != j) check_apart(written[i], all[j]);
    }
  }

  tensors_.mask_gradient = torch::stable::contiguous(t.mask_gradient);
  tensors_.pattern_gradient = torch::stable::contiguous(t.pattern_gradient);
  const auto planes = [](const Tensor& logits, const Tensor& gradient, const Tensor& first,
                         const Tensor& second, const std::optional<Tensor>& kept) {
    return TriggerPlanes{logits.mutable_data_ptr(), gradient.const_data_ptr(),
                         first.mutable_data_ptr(), second.mutable_data_ptr(),
                         kept.has_value() ? kept->mutable_data_ptr() : nullptr};
  };
  params.mask =
      planes(t.mask_logits, tensors_.mask_gradient, t.mask_first, t.mask_second, t.best_mask);
  params.pattern = planes(t.pattern_logits, tensors_.pattern_gradient, t.pattern_first,
                          t.pattern_second, t.best_pattern);
  const auto numbers = [](const Tensor& v) {
    return PerTrigger{v.const_data_ptr(),
                      v.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32};
  };
  params.cost = numbers(t.cost);
  params.learning_rate = numbers(t.learning_rate);
  if (t.variation.has_value()) params.variation = numbers(*t.variation);
  params.steps = static_cast<int64_t*>(t.steps.mutable_data_ptr());
  params.active = static_cast<const uint8_t*>(t.active.const_data_ptr());
  if (best) {
    params.eligible = static_cast<const uint8_t*>(t.eligible->const_data_ptr());
    params.best_norm = static_cast<double*>(t.best_norm->mutable_data_ptr());
  }
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.epsilon = epsilon;
  params.norms = static_cast<double*>(norms.mutable_data_ptr());
  const auto scratch = [&](int64_t doubles) {
    return torch::stable::new_empty(t.mask_logits, {doubles}, ScalarType::Double);
  };
  partials_ = scratch(params.triggers * params.mask_chunks());
  params.partials = static_cast<double*>(partials_.mutable_data_ptr());
  static_assert(sizeof(TriggerStep) % sizeof(double) == 0);
  plans_ = scratch(params.triggers * static_cast<int64_t>(sizeof(TriggerStep) / sizeof(double)));
  params.plans = static_cast<TriggerStep*>(plans_.mutable_data_ptr());
  if (t.variation.has_value()) {
    signs_ = torch::stable::new_empty(t.mask_logits, {params.triggers, params.height, params.width},
                                      ScalarType::Char);
    params.signs = static_cast<int8_t*>(signs_.mutable_data_ptr());
  }
}

}  // namespace pydetox::ops

#include "csrc/trigger_update/arguments.h"

#include "csrc/common/tensors.h"

namespace pydetox {
namespace {

constexpr const char* kOp = "trigger_update";

DType float_dtype(const Named& t) {
  const auto type = t.tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, kOp, ": ", t.name,
        " must be float32 or float64, found ", name_of(type));
  return dtype_of(t.tensor);
}

void check_like(const Named& t, const Named& like) {
  check(has_sizes(t.tensor, sizes_of(like.tensor)) &&
            t.tensor.scalar_type() == like.tensor.scalar_type(),
        kOp, ": ", t.name, " must be ", dtype_name(like.tensor), " ", ShapeOf{like.tensor}, " as ",
        like.name, " is, found ", dtype_name(t.tensor), " ", ShapeOf{t.tensor});
}

// type: of the elements; none: float32 or float64.
void check_vector(const Named& t, int64_t triggers, std::optional<ScalarType> type) {
  const auto found = t.tensor.scalar_type();
  const bool fits =
      type ? found == *type : found == ScalarType::Float || found == ScalarType::Double;
  check(fits && has_sizes(t.tensor, {triggers}), kOp, ": ", t.name, " must be ",
        type ? name_of(*type) : "float32 or float64", " [", triggers,
        "], one for each trigger, found ", name_of(found), " ", ShapeOf{t.tensor});
  check(t.tensor.is_contiguous(), kOp, ": ", t.name, " must be contiguous");
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
  check(t.mask_logits.dim() == 3, kOp, ": mask_logits must be [K, H, W], found ",
        ShapeOf{t.mask_logits});
  check(t.pattern_logits.dim() == 4 && t.pattern_logits.size(0) == t.mask_logits.size(0) &&
            t.pattern_logits.size(2) == t.mask_logits.size(1) &&
            t.pattern_logits.size(3) == t.mask_logits.size(2) &&
            t.pattern_logits.scalar_type() == t.mask_logits.scalar_type(),
        kOp, ": pattern_logits must be ", dtype_name(t.mask_logits), " [", t.mask_logits.size(0),
        ", C, ", t.mask_logits.size(1), ", ", t.mask_logits.size(2), "] for mask_logits ",
        ShapeOf{t.mask_logits}, ", found ", dtype_name(t.pattern_logits), " ",
        ShapeOf{t.pattern_logits});
  params.triggers = t.mask_logits.size(0);
  params.channels = t.pattern_logits.size(1);
  params.height = t.mask_logits.size(1);
  params.width = t.mask_logits.size(2);

  std::vector<Named> changed = {mask,
                                pattern,
                                {"mask_first", t.mask_first},
                                {"pattern_first", t.pattern_first},
                                {"mask_second", t.mask_second},
                                {"pattern_second", t.pattern_second}};
  const Named mask_gradient{"mask_gradient", t.mask_gradient};
  const Named pattern_gradient{"pattern_gradient", t.pattern_gradient};
  check_like(mask_gradient, mask);
  check_like(pattern_gradient, pattern);
  for (size_t i = 2; i < changed.size(); ++i) {
    check_like(changed[i], i % 2 == 0 ? mask : pattern);
  }

  std::vector<Named> vectors = {{"cost", t.cost}, {"learning_rate", t.learning_rate}};
  if (t.variation.has_value()) vectors.push_back({"total_variation", *t.variation});
  for (const auto& one : vectors) check_vector(one, params.triggers, std::nullopt);
  const Named steps{"steps", t.steps}, active{"active", t.active};
  check_vector(steps, params.triggers, ScalarType::Long);
  check_vector(active, params.triggers, ScalarType::Bool);
  vectors.push_back(active);
  changed.push_back(steps);

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
    check_vector(best_norm, params.triggers, ScalarType::Double);
    check_vector(eligible, params.triggers, ScalarType::Bool);
    vectors.push_back(eligible);
    changed.insert(changed.end(), {best_mask, best_pattern, best_norm});
  }
  check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, kOp,
        ": betas must be in [0, 1), found ", beta1, " and ", beta2);
  check(epsilon >= 0, kOp, ": epsilon must not be negative, found ", epsilon);

  std::vector<Named> all = changed;
  all.insert(all.end(), {mask_gradient, pattern_gradient});
  all.insert(all.end(), vectors.begin(), vectors.end());
  for (const auto& one : all) {
    check_device(kOp, one.name, one.tensor, "mask_logits", t.mask_logits);
  }
  for (size_t i = 0; i < changed.size(); ++i) {
    check(changed[i].tensor.is_contiguous(), kOp, ": ", changed[i].name, " must be contiguous");
    for (size_t j = 0; j < all.size(); ++j) {
      if (i != j) check_apart(kOp, changed[i], all[j]);
    }
  }

  tensors_.mask_gradient = torch::stable::contiguous(t.mask_gradient);
  tensors_.pattern_gradient = torch::stable::contiguous(t.pattern_gradient);
  const auto planes = [](const Tensor& logits, const Tensor& gradient, const Tensor& first,
                         const Tensor& second, const std::optional<Tensor>& kept) {
    return TriggerPlanes{written(logits), read(gradient), written(first), written(second),
                         kept.has_value() ? written(*kept) : nullptr};
  };
  params.mask =
      planes(t.mask_logits, tensors_.mask_gradient, t.mask_first, t.mask_second, t.best_mask);
  params.pattern = planes(t.pattern_logits, tensors_.pattern_gradient, t.pattern_first,
                          t.pattern_second, t.best_pattern);
  const auto numbers = [](const Tensor& v) { return PerTrigger{read(v), dtype_of(v)}; };
  params.cost = numbers(t.cost);
  params.learning_rate = numbers(t.learning_rate);
  if (t.variation.has_value()) params.variation = numbers(*t.variation);
  params.steps = written<int64_t>(t.steps);
  params.active = read<uint8_t>(t.active);
  if (best) {
    params.eligible = read<uint8_t>(*t.eligible);
    params.best_norm = written<double>(*t.best_norm);
  }
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.epsilon = epsilon;
  params.norms = written<double>(norms);
  partials_ = new_doubles(t.mask_logits, {params.triggers * params.mask_chunks()});
  params.partials = written<double>(partials_);
  static_assert(sizeof(TriggerStep) % sizeof(double) == 0);
  constexpr auto kPlanDoubles = static_cast<int64_t>(sizeof(TriggerStep) / sizeof(double));
  plans_ = new_doubles(t.mask_logits, {params.triggers * kPlanDoubles});
  params.plans = written<TriggerStep>(plans_);
  if (t.variation.has_value()) {
    signs_ = torch::stable::new_empty(t.mask_logits, {params.triggers, params.height, params.width},
                                      ScalarType::Char);
    params.signs = written<int8_t>(signs_);
  }
}

}  // namespace pydetox

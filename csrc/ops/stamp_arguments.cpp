#include "csrc/ops/stamp_arguments.h"

#include <initializer_list>

#include <torch/csrc/stable/ops.h>

#include "csrc/ops/check.h"

namespace pydetox::ops {
namespace {

using torch::stable::contiguous;

DType dtype_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      check(false, "stamp_triggers: ", what, " must be uint8, bfloat16, float32 or float64");
      return DType::kUInt8;
  }
}

// The rule of csrc/core/stamp.h: float64 in, float64 out; float32 in, float32 or bfloat16 out.
void check_float_types(DType compute, DType other, const char* what) {
  check(compute == DType::kFloat32 || compute == DType::kFloat64,
        "stamp_triggers: the logits must be float32 or float64");
  const bool fits = compute == DType::kFloat64
                        ? other == DType::kFloat64
                        : other == DType::kFloat32 || other == DType::kBFloat16;
  check(fits, "stamp_triggers: ", what,
        " must be float64 for float64 logits, float32 or bfloat16 for float32 logits");
}

StampShape checked_shape(const Tensor& images, const Tensor& mask_logits,
                         const Tensor& pattern_logits, int64_t patch_size) {
  check(images.dim() == 4, "stamp_triggers: images must be [B, C, H, W], not ", ShapeOf{images});
  const StampShape shape{mask_logits.dim() == 3 ? mask_logits.size(0) : 0,
                         images.size(0),
                         images.size(1),
                         images.size(2),
                         images.size(3),
                         patch_size};
  check(mask_logits.dim() == 3 && mask_logits.size(1) == shape.height &&
            mask_logits.size(2) == shape.width,
        "stamp_triggers: mask_logits must be [K, H, W] for images ", ShapeOf{images}, ", not ",
        ShapeOf{mask_logits});
  check(pattern_logits.dim() == 4 && pattern_logits.size(0) == shape.triggers &&
            pattern_logits.size(1) == shape.channels && pattern_logits.size(2) == shape.height &&
            pattern_logits.size(3) == shape.width,
        "stamp_triggers: pattern_logits must be [K, C, H, W] for images ", ShapeOf{images},
        " and mask_logits ", ShapeOf{mask_logits}, ", not ", ShapeOf{pattern_logits});
  check(mask_logits.scalar_type() == pattern_logits.scalar_type(),
        "stamp_triggers: mask_logits and pattern_logits must have one dtype");
  check(images.device() == mask_logits.device() && images.device() == pattern_logits.device(),
        "stamp_triggers: images, mask_logits and pattern_logits must be on one device");
  check(shape.channels <= kMaxChannels, "stamp_triggers: at most ", kMaxChannels, " channels, not ",
        shape.channels);
  check(patch_size >= 0, "stamp_triggers: patch_size must not be negative, not ", patch_size);
  check(patch_size == 0 || (shape.height % patch_size == 0 && shape.width % patch_size == 0),
        "stamp_triggers: patch_size ", patch_size, " does not divide images ", ShapeOf{images});
  return shape;
}

Normalization checked_normalization(const StampShape& shape, const std::vector<double>& mean,
                                    const std::vector<double>& std) {
  const auto count = static_cast<size_t>(shape.channels);
  check(mean.size() == count && std.size() == count, "stamp_triggers: mean and std must have ",
        count, " numbers each, one per channel, not ", mean.size(), " and ", std.size());
  Normalization normalization{};
  for (size_t c = 0; c < count; ++c) {
    normalization.mean[c] = mean[c];
    normalization.inverse_std[c] = 1 / std[c];
  }
  return normalization;
}

std::vector<int64_t> output_sizes(const StampShape& s) {
  if (s.patch == 0) return {s.triggers, s.images, s.channels, s.height, s.width};
  return {s.triggers, s.images, s.groups(), s.channels * s.inner()};
}

Tensor new_output(const Tensor& images, const Tensor& mask_logits, const Tensor& pattern_logits,
                  int64_t patch_size, ScalarType dtype) {
  const auto shape = checked_shape(images, mask_logits, pattern_logits, patch_size);
  return torch::stable::new_empty(images, output_sizes(shape), dtype);
}

bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  }
  return same;
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// What a kernel writes to must be there as it expects it, and be none of what it reads.
void check_out(const Named& out, const std::vector<int64_t>& sizes, ScalarType dtype,
               std::initializer_list<Named> others) {
  check(has_sizes(out.tensor, sizes), "stamp_triggers: ", out.name, " must be ", SizesOf{sizes},
        ", not ", ShapeOf{out.tensor});
  check(out.tensor.scalar_type() == dtype, "stamp_triggers: ", out.name, " has the wrong dtype");
  check(out.tensor.is_contiguous(), "stamp_triggers: ", out.name, " must be contiguous");
  const auto begin = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  // Of a strided argument only the first element's place is known here: it is enough to tell a view
  // of `out` that begins inside it, and a copy is made of it before anything is written.
  const auto end = [&](const Tensor& t) {
    const int64_t bytes = t.numel() * size_of(dtype_of(t.scalar_type(), "an argument"));
    return begin(t) + static_cast<uintptr_t>(t.is_contiguous() || bytes == 0 ? bytes : 1);
  };
  for (const auto& other : others) {
    check(out.tensor.device() == other.tensor.device(), "stamp_triggers: ", out.name, " and ",
          other.name, " must be on one device");
    check(begin(out.tensor) >= end(other.tensor) || begin(other.tensor) >= end(out.tensor),
          "stamp_triggers: ", out.name, " must not share memory with ", other.name);
  }
}

}  // namespace

StampForward::StampForward(const Tensor& images, const Tensor& mask_logits,
                           const Tensor& pattern_logits, const std::vector<double>& mean,
                           const std::vector<double>& std, int64_t patch_size, ScalarType dtype)
    : StampForward(images, mask_logits, pattern_logits, mean, std, patch_size,
                   new_output(images, mask_logits, pattern_logits, patch_size, dtype)) {}

StampForward::StampForward(const Tensor& images, const Tensor& mask_logits,
                           const Tensor& pattern_logits, const std::vector<double>& mean,
                           const std::vector<double>& std, int64_t patch_size, const Tensor& out)
    : output(out),
      images_(contiguous(images)),
      mask_logits_(contiguous(mask_logits)),
      pattern_logits_(contiguous(pattern_logits)) {
  params.shape = checked_shape(images, mask_logits, pattern_logits, patch_size);
  params.normalization = checked_normalization(params.shape, mean, std);
  params.compute_dtype = dtype_of(mask_logits.scalar_type(), "mask_logits");
  params.image_dtype = dtype_of(images.scalar_type(), "images");
  params.output_dtype = dtype_of(out.scalar_type(), "the output");
  check_float_types(params.compute_dtype, params.output_dtype, "the output");
  check_out({"out", out}, output_sizes(params.shape), out.scalar_type(),
            {{"images", images}, {"mask_logits", mask_logits}, {"pattern_logits", pattern_logits}});
  params.images = images_.const_data_ptr();
  params.mask_logits = mask_logits_.const_data_ptr();
  params.pattern_logits = pattern_logits_.const_data_ptr();
  params.output = output.mutable_data_ptr();
}

StampBackward::StampBackward(const Tensor& gradient, const Tensor& images,
                             const Tensor& mask_logits, const Tensor& pattern_logits,
                             const std::vector<double>& mean, const std::vector<double>& std,
                             int64_t patch_size)
    : StampBackward(gradient, images, mask_logits, pattern_logits, mean, std, patch_size,
                    torch::stable::empty_like(contiguous(mask_logits)),
                    torch::stable::empty_like(contiguous(pattern_logits))) {}

StampBackward::StampBackward(const Tensor& gradient, const Tensor& images,
                             const Tensor& mask_logits, const Tensor& pattern_logits,
                             const std::vector<double>& mean, const std::vector<double>& std,
                             int64_t patch_size, const Tensor& mask_logits_out,
                             const Tensor& pattern_logits_out)
    : mask_logits_gradient(mask_logits_out),
      pattern_logits_gradient(pattern_logits_out),
      gradient_(contiguous(gradient)),
      images_(contiguous(images)),
      mask_logits_(contiguous(mask_logits)),
      pattern_logits_(contiguous(pattern_logits)) {
  params.shape = checked_shape(images, mask_logits, pattern_logits, patch_size);
  params.normalization = checked_normalization(params.shape, mean, std);
  params.compute_dtype = dtype_of(mask_logits.scalar_type(), "mask_logits");
  params.image_dtype = dtype_of(images.scalar_type(), "images");
  params.gradient_dtype = dtype_of(gradient.scalar_type(), "the gradient");
  check_float_types(params.compute_dtype, params.gradient_dtype, "the gradient");
  check(has_sizes(gradient, output_sizes(params.shape)), "stamp_triggers_backward: gradient ",
        ShapeOf{gradient}, " is not the shape of the output for images ", ShapeOf{images},
        ", mask_logits ", ShapeOf{mask_logits}, " and patch_size ", patch_size);
  check(gradient.device() == images.device(),
        "stamp_triggers_backward: gradient and images must be on one device");
  const auto& s = params.shape;
  const Named first{"mask_logits_gradient", mask_logits_out};
  const Named second{"pattern_logits_gradient", pattern_logits_out};
  check_out(first, {s.triggers, s.height, s.width}, mask_logits.scalar_type(),
            {{"gradient", gradient},
             {"images", images},
             {"mask_logits", mask_logits},
             {"pattern_logits", pattern_logits},
             second});
  check_out(second, {s.triggers, s.channels, s.height, s.width}, mask_logits.scalar_type(),
            {{"gradient", gradient},
             {"images", images},
             {"mask_logits", mask_logits},
             {"pattern_logits", pattern_logits}});
  params.gradient = gradient_.const_data_ptr();
  params.images = images_.const_data_ptr();
  params.mask_logits = mask_logits_.const_data_ptr();
  params.pattern_logits = pattern_logits_.const_data_ptr();
  params.mask_logits_gradient = mask_logits_gradient.mutable_data_ptr();
  params.pattern_logits_gradient = pattern_logits_gradient.mutable_data_ptr();
}

}  // namespace pydetox::ops

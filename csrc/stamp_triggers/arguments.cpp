#include "csrc/stamp_triggers/arguments.h"

#include <initializer_list>

#include "csrc/common/place.h"
#include "csrc/common/tensors.h"

namespace pydetox {
namespace {

using torch::stable::contiguous;

constexpr const char* kOp = "stamp_triggers";

void check_images(const Tensor& images) {
  const auto type = images.scalar_type();
  check(type == ScalarType::Byte || type == ScalarType::BFloat16 || type == ScalarType::Float ||
            type == ScalarType::Double,
        kOp, ": images must be uint8, bfloat16, float32 or float64, found ", name_of(type));
}

void check_logits(const Tensor& mask, const Tensor& pattern) {
  const auto type = mask.scalar_type();
  check((type == ScalarType::Float || type == ScalarType::Double) && pattern.scalar_type() == type,
        kOp, ": mask_logits and pattern_logits must both be float32 or both float64, found ",
        name_of(type), " and ", dtype_name(pattern));
}

// The rule of csrc/stamp_triggers/core.h: float64 in, float64 out; float32 in, float32 or bfloat16
// out.
void check_float_types(ScalarType logits, ScalarType other, const char* name) {
  const bool fits = logits == ScalarType::Double
                        ? other == ScalarType::Double
                        : other == ScalarType::Float || other == ScalarType::BFloat16;
  check(fits, kOp, ": ", name,
        " must be float64 for float64 logits, float32 or bfloat16 for float32 logits, found ",
        name_of(other), " for ", name_of(logits));
}

// Sizes that fit together; `crop` without its corners, which may have to be copied first.
struct Problem {
  StampShape shape;
  StampCrop crop;
  int64_t image_stride;
};

void check_corners(const Tensor& corners, const Tensor& images, const Problem& problem) {
  const StampShape& shape = problem.shape;
  check(corners.dim() == 2 && corners.size(0) == shape.triggers && corners.size(1) == 2 &&
            corners.scalar_type() == ScalarType::Long,
        kOp, ": corners must be int64 [", shape.triggers,
        ", 2], a top and a left for each trigger, found ", dtype_name(corners), " ",
        ShapeOf{corners});
  check(corners.is_cpu() || corners.device() == images.device(), kOp,
        ": corners must be on the CPU or on the device of the images, ", DeviceOf{images},
        ", found ", DeviceOf{corners});
  // A look at a GPU's memory would wait for it; the emulator's tensors stand for such.
  if (kEmulated || !corners.is_cpu()) return;
  const Tensor plain = contiguous(corners);
  const auto* corner = static_cast<const int64_t*>(plain.const_data_ptr());
  const int64_t last_top = shape.height - problem.crop.height;
  const int64_t last_left = shape.width - problem.crop.width;
  for (int64_t k = 0; k < shape.triggers; ++k, corner += 2) {
    check(corner[0] >= 0 && corner[0] <= last_top && corner[1] >= 0 && corner[1] <= last_left, kOp,
          ": corners[", k, "] is (", corner[0], ", ", corner[1], "); a box of ",
          problem.crop.height, "x", problem.crop.width, " in images of ", shape.height, "x",
          shape.width, " has its top in 0..", last_top, " and its left in 0..", last_left);
  }
}

Problem checked_problem(const StampInputs& in) {
  const Tensor& images = in.images;
  const Tensor& mask = in.mask_logits;
  const bool own_images = images.dim() == 5;
  check(images.dim() == 4 || own_images, kOp,
        ": images must be [B, C, H, W] or [K, B, C, H, W], found ", ShapeOf{images});
  const int64_t first = own_images ? 1 : 0;  // dimension
  const StampShape shape{mask.dim() == 3 ? mask.size(0) : 0,
                         images.size(first),
                         images.size(first + 1),
                         images.size(first + 2),
                         images.size(first + 3),
                         in.patch_size.value_or(0)};
  if (in.corners) {
    check(mask.dim() == 3 && mask.size(1) <= shape.height && mask.size(2) <= shape.width, kOp,
          ": with corners, mask_logits must be [K, h, w] with h <= ", shape.height,
          " and w <= ", shape.width, " for images ", ShapeOf{images}, ", found ", ShapeOf{mask});
  } else {
    check(mask.dim() == 3 && mask.size(1) == shape.height && mask.size(2) == shape.width, kOp,
          ": mask_logits must be [K, ", shape.height, ", ", shape.width, "] for images ",
          ShapeOf{images}, ", found ", ShapeOf{mask});
  }
  check(!own_images || images.size(0) == shape.triggers, kOp,
        ": images [K, B, C, H, W] must have a batch for each of ", shape.triggers,
        " triggers, found ", ShapeOf{images});
  const StampCrop crop{mask.size(1), mask.size(2), nullptr};
  const std::vector<int64_t> pattern{shape.triggers, shape.channels, crop.height, crop.width};
  check(has_sizes(in.pattern_logits, pattern), kOp, ": pattern_logits must be ", SizesOf{pattern},
        " for images ", ShapeOf{images}, " and mask_logits ", ShapeOf{mask}, ", found ",
        ShapeOf{in.pattern_logits});
  check(shape.channels <= kMaxChannels, kOp, ": at most ", kMaxChannels, " channels, found images ",
        ShapeOf{images});
  check_images(images);
  check_logits(mask, in.pattern_logits);
  check_device(kOp, "mask_logits", mask, "images", images);
  check_device(kOp, "pattern_logits", in.pattern_logits, "images", images);
  check(!in.patch_size || (*in.patch_size >= 1 && shape.height % *in.patch_size == 0 &&
                           shape.width % *in.patch_size == 0),
        kOp, ": patch_size must divide height and width of images ", ShapeOf{images}, ", found ",
        in.patch_size.value_or(0));
  const Problem problem{shape, crop,
                        own_images ? shape.images * shape.channels * shape.pixels() : 0};
  if (in.corners) check_corners(*in.corners, images, problem);
  return problem;
}

void check_per_channel(const char* name, const std::vector<double>& values, int64_t channels) {
  check(static_cast<int64_t>(values.size()) == channels, kOp, ": ", name,
        " must have one number for each of ", channels, " channels, found ", values.size());
}

Normalization checked_normalization(const StampShape& shape, const std::vector<double>& mean,
                                    const std::vector<double>& std) {
  check_per_channel("mean", mean, shape.channels);
  check_per_channel("std", std, shape.channels);
  Normalization normalization{};
  for (size_t c = 0; c < mean.size(); ++c) {
    check(std[c] != 0, kOp, ": std must not be 0, found 0 for channel ", c);
    normalization.mean[c] = mean[c];
    normalization.inverse_std[c] = 1 / std[c];
  }
  return normalization;
}

std::vector<int64_t> output_sizes(const StampShape& s) {
  if (s.patch == 0) return {s.triggers, s.images, s.channels, s.height, s.width};
  return {s.triggers, s.images, s.groups(), s.channels * s.inner()};
}

// What a kernel writes to must be there as it expects it, and be none of what it reads.
void check_out(const Named& out, const std::vector<int64_t>& sizes, ScalarType dtype,
               const Tensor& images, std::initializer_list<Named> others) {
  check(has_sizes(out.tensor, sizes) && out.tensor.scalar_type() == dtype, kOp, ": ", out.name,
        " must be ", name_of(dtype), " ", SizesOf{sizes}, ", found ", dtype_name(out.tensor), " ",
        ShapeOf{out.tensor});
  check_device(kOp, out.name, out.tensor, "images", images);
  check(out.tensor.is_contiguous(), kOp, ": ", out.name, " must be contiguous");
  for (const auto& other : others) check_apart(kOp, out, other);
}

// Contiguous and on the device of the images.
std::optional<Tensor> placed_corners(const StampInputs& in) {
  if (!in.corners) return std::nullopt;
  const Tensor plain = contiguous(*in.corners);
  if (plain.device() == in.images.device()) return plain;
  return torch::stable::to(plain, in.images.device());
}

}  // namespace

StampTensors::StampTensors(const StampInputs& in)
    : problem_checked_((checked_problem(in), true)),
      images_(contiguous(in.images)),
      mask_logits_(contiguous(in.mask_logits)),
      pattern_logits_(contiguous(in.pattern_logits)),
      corners_(placed_corners(in)) {}

template <class Params>
void StampTensors::fill(const StampInputs& in, Params& params) const {
  const Problem problem = checked_problem(in);
  params.shape = problem.shape;
  params.crop = problem.crop;
  // A box as large as the image has one place: the fast kernels know it.
  const bool whole =
      problem.crop.height == problem.shape.height && problem.crop.width == problem.shape.width;
  if (corners_ && !whole) {
    params.crop.corners = read<int64_t>(*corners_);
  }
  params.image_stride = problem.image_stride;
  params.normalization = checked_normalization(params.shape, in.mean, in.std);
  params.compute_dtype = dtype_of(in.mask_logits);
  params.image_dtype = dtype_of(in.images);
  params.images = read(images_);
  params.mask_logits = read(mask_logits_);
  params.pattern_logits = read(pattern_logits_);
}

StampForward::StampForward(const StampInputs& in, ScalarType dtype)
    : StampForward(
          in, torch::stable::new_empty(in.images, output_sizes(checked_problem(in).shape), dtype),
          /*only_box=*/false) {}

StampForward::StampForward(const StampInputs& in, const Tensor& out, bool only_box)
    : StampTensors(in), output(out) {
  fill(in, params);
  check_float_types(in.mask_logits.scalar_type(), out.scalar_type(), "out");
  params.output_dtype = dtype_of(out);
  check(!only_box || in.corners, kOp, ": only_box needs corners");
  check_out({"out", out}, output_sizes(params.shape), out.scalar_type(), in.images,
            {{"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits}});
  params.only_box = only_box;
  params.output = written(output);
}

StampBackward::StampBackward(const Tensor& gradient, const StampInputs& in)
    : StampBackward(gradient, in, torch::stable::empty_like(contiguous(in.mask_logits)),
                    torch::stable::empty_like(contiguous(in.pattern_logits))) {}

StampBackward::StampBackward(const Tensor& gradient, const StampInputs& in,
                             const Tensor& mask_logits_out, const Tensor& pattern_logits_out)
    : StampTensors(in),
      mask_logits_gradient(mask_logits_out),
      pattern_logits_gradient(pattern_logits_out),
      gradient_(contiguous(gradient)) {
  fill(in, params);
  check_float_types(in.mask_logits.scalar_type(), gradient.scalar_type(), "gradient");
  params.gradient_dtype = dtype_of(gradient);
  const auto sizes = output_sizes(params.shape);
  check(has_sizes(gradient, sizes), kOp, ": gradient must be ", SizesOf{sizes}, " for images ",
        ShapeOf{in.images}, " and mask_logits ", ShapeOf{in.mask_logits}, ", found ",
        ShapeOf{gradient});
  check_device(kOp, "gradient", gradient, "images", in.images);
  const auto& s = params.shape;
  const auto& box = params.crop;
  const Named first{"mask_logits_gradient", mask_logits_out};
  const Named second{"pattern_logits_gradient", pattern_logits_out};
  check_out(first, {s.triggers, box.height, box.width}, in.mask_logits.scalar_type(), in.images,
            {{"gradient", gradient},
             {"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits},
             second});
  check_out(second, {s.triggers, s.channels, box.height, box.width}, in.mask_logits.scalar_type(),
            in.images,
            {{"gradient", gradient},
             {"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits}});
  params.gradient = read(gradient_);
  params.mask_logits_gradient = written(mask_logits_gradient);
  params.pattern_logits_gradient = written(pattern_logits_gradient);
}

}  // namespace pydetox

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

// Sizes that fit together; `crop` without its corners, which are not contiguous yet.
struct Problem {
  StampShape shape;
  StampCrop crop;
  int64_t image_stride;
};

void check_corners(const Tensor& corners, const Tensor& images, const Problem& problem) {
  const StampShape& shape = problem.shape;
  check(corners.dim() == 2 && corners.size(0) == shape.triggers && corners.size(1) == 2,
        "stamp_triggers: corners must be [K, 2], a top and a left for each of ", shape.triggers,
        " triggers, not ", ShapeOf{corners});
  check(corners.scalar_type() == ScalarType::Long, "stamp_triggers: corners must be int64");
  check(corners.device() == images.device(),
        "stamp_triggers: corners and images must be on one device");
  if (!corners.is_cpu()) return;  // a look at a GPU's memory would wait for it
  const Tensor plain = contiguous(corners);
  const auto* corner = static_cast<const int64_t*>(plain.const_data_ptr());
  const int64_t last_top = shape.height - problem.crop.height;
  const int64_t last_left = shape.width - problem.crop.width;
  for (int64_t k = 0; k < shape.triggers; ++k, corner += 2) {
    check(corner[0] >= 0 && corner[0] <= last_top && corner[1] >= 0 && corner[1] <= last_left,
          "stamp_triggers: corners[", k, "] is (", corner[0], ", ", corner[1], "); a box of ",
          problem.crop.height, "x", problem.crop.width, " in images of ", shape.height, "x",
          shape.width, " has its top in 0..", last_top, " and its left in 0..", last_left);
  }
}

Problem checked_problem(const StampInputs& in) {
  const Tensor& images = in.images;
  const bool own_images = images.dim() == 5;
  check(images.dim() == 4 || own_images,
        "stamp_triggers: images must be [B, C, H, W] or [K, B, C, H, W], not ", ShapeOf{images});
  const int64_t first = own_images ? 1 : 0;  // dimension
  const StampShape shape{in.mask_logits.dim() == 3 ? in.mask_logits.size(0) : 0,
                         images.size(first),
                         images.size(first + 1),
                         images.size(first + 2),
                         images.size(first + 3),
                         in.patch_size};
  if (in.corners) {
    check(
        in.mask_logits.dim() == 3 && in.mask_logits.size(1) <= shape.height &&
            in.mask_logits.size(2) <= shape.width,
        "stamp_triggers: with corners, mask_logits must be [K, h, w], at most as large as images ",
        ShapeOf{images}, ", not ", ShapeOf{in.mask_logits});
  } else {
    check(in.mask_logits.dim() == 3 && in.mask_logits.size(1) == shape.height &&
              in.mask_logits.size(2) == shape.width,
          "stamp_triggers: mask_logits must be [K, H, W] for images ", ShapeOf{images}, ", not ",
          ShapeOf{in.mask_logits});
  }
  check(!own_images || images.size(0) == shape.triggers,
        "stamp_triggers: images must be [K, B, C, H, W] with K = ", shape.triggers,
        " as in mask_logits ", ShapeOf{in.mask_logits}, ", not ", ShapeOf{images});
  const StampCrop crop{in.mask_logits.size(1), in.mask_logits.size(2), nullptr};
  check(in.pattern_logits.dim() == 4 && in.pattern_logits.size(0) == shape.triggers &&
            in.pattern_logits.size(1) == shape.channels &&
            in.pattern_logits.size(2) == crop.height && in.pattern_logits.size(3) == crop.width,
        "stamp_triggers: pattern_logits must be [K, C, ", crop.height, ", ", crop.width,
        "] for images ", ShapeOf{images}, " and mask_logits ", ShapeOf{in.mask_logits}, ", not ",
        ShapeOf{in.pattern_logits});
  check(in.mask_logits.scalar_type() == in.pattern_logits.scalar_type(),
        "stamp_triggers: mask_logits and pattern_logits must have one dtype");
  check(images.device() == in.mask_logits.device() && images.device() == in.pattern_logits.device(),
        "stamp_triggers: images, mask_logits and pattern_logits must be on one device");
  check(shape.channels <= kMaxChannels, "stamp_triggers: at most ", kMaxChannels, " channels, not ",
        shape.channels);
  check(in.patch_size >= 0, "stamp_triggers: patch_size must not be negative, not ", in.patch_size);
  check(
      in.patch_size == 0 || (shape.height % in.patch_size == 0 && shape.width % in.patch_size == 0),
      "stamp_triggers: patch_size ", in.patch_size, " does not divide images ", ShapeOf{images});
  const Problem problem{shape, crop,
                        own_images ? shape.images * shape.channels * shape.pixels() : 0};
  if (in.corners) check_corners(*in.corners, images, problem);
  return problem;
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

StampTensors::StampTensors(const StampInputs& in)
    : images_(contiguous(in.images)),
      mask_logits_(contiguous(in.mask_logits)),
      pattern_logits_(contiguous(in.pattern_logits)),
      corners_(in.corners ? std::optional<Tensor>(contiguous(*in.corners)) : std::nullopt) {}

template <class Params>
void StampTensors::fill(const StampInputs& in, Params& params) const {
  const Problem problem = checked_problem(in);
  params.shape = problem.shape;
  params.crop = problem.crop;
  // A box as large as the image has one place: the fast kernels know it.
  const bool whole =
      problem.crop.height == problem.shape.height && problem.crop.width == problem.shape.width;
  if (corners_ && !whole) {
    params.crop.corners = static_cast<const int64_t*>(corners_->const_data_ptr());
  }
  params.image_stride = problem.image_stride;
  params.normalization = checked_normalization(params.shape, in.mean, in.std);
  params.compute_dtype = dtype_of(in.mask_logits.scalar_type(), "mask_logits");
  params.image_dtype = dtype_of(in.images.scalar_type(), "images");
  params.images = images_.const_data_ptr();
  params.mask_logits = mask_logits_.const_data_ptr();
  params.pattern_logits = pattern_logits_.const_data_ptr();
}

StampForward::StampForward(const StampInputs& in, ScalarType dtype)
    : StampForward(
          in, torch::stable::new_empty(in.images, output_sizes(checked_problem(in).shape), dtype),
          /*only_box=*/false) {}

StampForward::StampForward(const StampInputs& in, const Tensor& out, bool only_box)
    : StampTensors(in), output(out) {
  fill(in, params);
  params.output_dtype = dtype_of(out.scalar_type(), "the output");
  check_float_types(params.compute_dtype, params.output_dtype, "the output");
  check(!only_box || in.corners, "stamp_triggers: only_box needs corners");
  check_out({"out", out}, output_sizes(params.shape), out.scalar_type(),
            {{"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits}});
  params.only_box = only_box;
  params.output = output.mutable_data_ptr();
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
  params.gradient_dtype = dtype_of(gradient.scalar_type(), "the gradient");
  check_float_types(params.compute_dtype, params.gradient_dtype, "the gradient");
  check(has_sizes(gradient, output_sizes(params.shape)), "stamp_triggers_backward: gradient ",
        ShapeOf{gradient}, " is not the shape of the output for images ", ShapeOf{in.images},
        ", mask_logits ", ShapeOf{in.mask_logits}, " and patch_size ", in.patch_size);
  check(gradient.device() == in.images.device(),
        "stamp_triggers_backward: gradient and images must be on one device");
  const auto& s = params.shape;
  const auto& box = params.crop;
  const Named first{"mask_logits_gradient", mask_logits_out};
  const Named second{"pattern_logits_gradient", pattern_logits_out};
  check_out(first, {s.triggers, box.height, box.width}, in.mask_logits.scalar_type(),
            {{"gradient", gradient},
             {"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits},
             second});
  check_out(second, {s.triggers, s.channels, box.height, box.width}, in.mask_logits.scalar_type(),
            {{"gradient", gradient},
             {"images", in.images},
             {"mask_logits", in.mask_logits},
             {"pattern_logits", in.pattern_logits}});
  params.gradient = gradient_.const_data_ptr();
  params.mask_logits_gradient = mask_logits_gradient.mutable_data_ptr();
  params.pattern_logits_gradient = pattern_logits_gradient.mutable_data_ptr();
}

}  // namespace pydetox::ops

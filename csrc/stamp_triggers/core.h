#pragma once

// Stamping triggers: what every implementation (CPU, CUDA, emulator) agrees on. No torch, no CUDA
// header.
//
//   m = tanh(w_m)/2 + 1/2,  p = tanh(w_p)/2 + 1/2            mask and pattern from their logits
//   v = (1 - m) x + m p                                      blend
//   y = (clip(v, 0, 1) - mean) / std                         the model's normalisation
//
// All arithmetic is in the compute type T (the logits' type, float or double) with contraction off,
// and the sums of the backward pass run in the order that kBatchChunk fixes: every implementation
// is meant to give the same bits.

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/macros.h"
#include "csrc/common/sigmoid.h"

namespace pydetox {

constexpr int64_t kMaxChannels = 16;  // mean and std travel by value in the parameters

// Sizes and the order of the output's elements.
//
// Both layouts are one: the output of one trigger and one image is [groups, C, inner], where a
// group is a patch of P x P pixels, and plain NCHW is the case of a single patch that covers the
// image. Patch rows [(H/P)(W/P), C*P*P] have the column order (c, py, px), which is exactly
// [groups, C, inner] with inner = py * P + px.
struct StampShape {
  int64_t triggers;  // K
  int64_t images;    // B
  int64_t channels;  // C, at most kMaxChannels
  int64_t height;    // H
  int64_t width;     // W
  int64_t patch;     // P, a divisor of H and W; 0 for NCHW

  PYDETOX_HD int64_t pixels() const { return height * width; }
  PYDETOX_HD int64_t inner() const { return patch == 0 ? pixels() : patch * patch; }
  PYDETOX_HD int64_t groups() const { return patch == 0 ? 1 : (height / patch) * (width / patch); }
  // Pixels that lie next to each other both in the image and in the output.
  PYDETOX_HD int64_t run() const { return patch == 0 ? pixels() : patch; }

  // Where in its H x W plane the pixel (group, inner) lies.
  PYDETOX_HD int64_t plane_offset(int64_t group, int64_t inner_index) const {
    if (patch == 0) return inner_index;
    const int64_t per_row = width / patch;
    const int64_t y = (group / per_row) * patch + inner_index / patch;
    const int64_t x = (group % per_row) * patch + inner_index % patch;
    return y * width + x;
  }
  // Where in the output [K, B, groups, C, inner] an element lies.
  PYDETOX_HD int64_t output_offset(int64_t k, int64_t b, int64_t group, int64_t channel,
                                   int64_t inner_index) const {
    return (((k * images + b) * groups() + group) * channels + channel) * inner() + inner_index;
  }
  // Where in the output of one image the pixel (y, x) of channel 0 lies; channels are inner()
  // apart.
  PYDETOX_HD int64_t pixel_offset(int64_t y, int64_t x) const {
    if (patch == 0) return y * width + x;
    const int64_t group = y / patch * (width / patch) + x / patch;
    return output_offset(0, 0, group, 0, y % patch * patch + x % patch);
  }
};

struct Corner {
  int64_t top, left;
};

// Triggers that are zero outside of a box: their logits are those of the box, [K, h, w] and
// [K, C, h, w], and outside of it the output is what a mask of exactly 0 gives.
struct StampCrop {
  int64_t height;          // h, at most H
  int64_t width;           // w, at most W
  const int64_t* corners;  // [K, 2]: top and left; null: no crop, the logits are of all pixels

  // The box as a problem of its own: planes of h x w.
  PYDETOX_HD StampShape box(const StampShape& shape) const {
    return {shape.triggers, shape.images, shape.channels, height, width, 0};
  }
  // Of a trigger, given what `corners` says. Corners in a GPU's memory cannot be checked without
  // waiting for it: a box that would stick out of the image is moved to its border.
  PYDETOX_HD Corner inside(const StampShape& shape, const int64_t* corner) const {
    const auto clamp = [](int64_t value, int64_t last) {
      return value < 0 ? 0 : value > last ? last : value;
    };
    return {clamp(corner[0], shape.height - height), clamp(corner[1], shape.width - width)};
  }
};

struct Normalization {
  double mean[kMaxChannels];
  double inverse_std[kMaxChannels];  // 1 / std
};

// Tensors are contiguous. T is the logits' type: kFloat32 or kFloat64.
struct StampForwardParams {
  StampShape shape;
  StampCrop crop;
  Normalization normalization;
  DType compute_dtype;
  DType image_dtype;           // any; kUInt8 is scaled by 1/255
  DType output_dtype;          // kFloat64 where T is; else kFloat32 or kBFloat16
  bool only_box;               // write the box alone: the rest of `output` is as it should be
  int64_t image_stride;        // elements from one trigger's images to the next's; 0: shared
  const void* images;          // [B, C, H, W] or [K, B, C, H, W]
  const void* mask_logits;     // T [K, H, W], or [K, h, w] of the crop
  const void* pattern_logits;  // T [K, C, H, W], or [K, C, h, w]
  void* output;                // [K, B, groups, C, inner]
};

struct StampBackwardParams {
  StampShape shape;
  StampCrop crop;
  Normalization normalization;
  DType compute_dtype;
  DType image_dtype;
  DType gradient_dtype;           // as output_dtype above
  int64_t image_stride;           // as above
  const void* gradient;           // [K, B, groups, C, inner]: d loss / d output; its box is read
  const void* images;             // [B, C, H, W] or [K, B, C, H, W]
  const void* mask_logits;        // T [K, H, W], or [K, h, w] of the crop
  const void* pattern_logits;     // T [K, C, H, W], or [K, C, h, w]
  void* mask_logits_gradient;     // T, like the logits; every element written
  void* pattern_logits_gradient;  // T, like the logits; every element written
};

// visit(TypeTag of the type of images); false where no kernel takes such images.
template <class Visit>
PYDETOX_HOST bool with_image_type(DType dtype, const Visit& visit) {
  return with_type<uint8_t, BFloat16, float, double>(dtype, visit);
}

// visit(TypeTag of T, TypeTag of the type of the output or its gradient); false where no kernel has
// them together.
template <class Visit>
PYDETOX_HOST bool with_float_types(DType compute, DType other, const Visit& visit) {
  if (compute == DType::kFloat64) {
    return with_type<double>(other, [&](auto type) { visit(TypeTag<double>{}, type); });
  }
  return compute == DType::kFloat32 &&
         with_type<float, BFloat16>(other, [&](auto type) { visit(TypeTag<float>{}, type); });
}

// Defined by each backend (csrc/common/place.h).
int run_stamp_forward(const StampForwardParams& params, void* stream);
int run_stamp_backward(const StampBackwardParams& params, void* stream);

// The sums over images run in chunks of kBatchChunk: inside a chunk in T, over b and inside it over
// c, ascending, from zero; the chunks' sums in double, ascending, from zero. Eight float32 terms
// lose less than PyTorch's own sums do, and chunks can be computed side by side on a GPU.
constexpr int64_t kBatchChunk = 8;
PYDETOX_HD constexpr int64_t batch_chunks(int64_t images) {
  return (images + kBatchChunk - 1) / kBatchChunk;
}

// What blending needs of one trigger at one pixel and channel: v = keep * x + add.
template <class V>
struct Blend {
  V keep;  // 1 - m
  V add;   // m p
  PYDETOX_HD V operator()(V x) const { return keep * x + add; }
};

template <class V>
PYDETOX_HD Blend<V> make_blend(const Sigmoid<V>& mask, const Sigmoid<V>& pattern) {
  return {mask.complement, mask.value * pattern.value};
}
// Where there is no trigger: a mask of exactly 0.
template <class V>
PYDETOX_HD Blend<V> no_trigger() {
  return {V{} + static_cast<typename Lanes<V>::Element>(1), V{}};
}

// clip(v, 0, 1), where NaN stays NaN, then the model's normalisation.
template <class V, class T>
PYDETOX_HD V clip_and_normalize(V blended, T mean, T inverse_std) {
  const V zero = V{};
  const V one = V{} + static_cast<T>(1);
  blended = zero > blended ? zero : blended;
  blended = one < blended ? one : blended;
  return (blended - mean) * inverse_std;
}

// The upstream gradient where clip lets it through: on the closed interval, as torch.clamp does,
// and nowhere else.
template <class V>
PYDETOX_HD V passed_gradient(V blended, V upstream) {
  const V zero = V{};
  const V one = V{} + static_cast<typename Lanes<V>::Element>(1);
  return (blended >= zero) & (blended <= one) ? upstream : zero;
}

// The terms of the two sums, with g = passed_gradient(...):
//   d loss / d m = sum over b, c of g / std (p - x)      d loss / d p = m / std * sum over b of g
template <class V, class T>
PYDETOX_HD V mask_term(V g, T inverse_std, V pattern, V x) {
  return g * inverse_std * (pattern - x);
}

// From the finished sums to the gradients of the logits: in double, rounded to T once.
template <class T>
PYDETOX_HD T mask_logit_gradient(double mask_sum, const Sigmoid<T>& mask) {
  const double slope = 2.0 * mask.value * mask.complement;
  return static_cast<T>(mask_sum * slope);
}
template <class T>
PYDETOX_HD T pattern_logit_gradient(double pattern_sum, double inverse_std, const Sigmoid<T>& mask,
                                    const Sigmoid<T>& pattern) {
  const double slope = 2.0 * pattern.value * pattern.complement;
  return static_cast<T>(pattern_sum * inverse_std * mask.value * slope);
}

}  // namespace pydetox

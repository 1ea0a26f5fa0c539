#pragma once

// Which instantiation of a kernel runs, on what grid. One function for the GPU (stamp_triggers.cu)
// and for the emulator, so that the tests cover it.

#include <cstdint>

#include "csrc/cuda/stamp_triggers.cuh"

namespace pydetox::cuda {

template <class T>
struct TypeTag {
  using Type = T;
};

// visit(TypeTag of the type that dtype stands for).
template <class Visit>
bool with_image_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kUInt8:
      return visit(TypeTag<uint8_t>{});
    case DType::kBFloat16:
      return visit(TypeTag<BFloat16>{});
    case DType::kFloat32:
      return visit(TypeTag<float>{});
    case DType::kFloat64:
      return visit(TypeTag<double>{});
    default:
      return false;
  }
}

// visit(compute type, output type).
template <class Visit>
bool with_float_types(DType compute, DType output, const Visit& visit) {
  if (compute == DType::kFloat64 && output == DType::kFloat64) {
    return visit(TypeTag<double>{}, TypeTag<double>{});
  }
  if (compute == DType::kFloat32 && output == DType::kFloat32) {
    return visit(TypeTag<float>{}, TypeTag<float>{});
  }
  if (compute == DType::kFloat32 && output == DType::kBFloat16) {
    return visit(TypeTag<float>{}, TypeTag<BFloat16>{});
  }
  return false;
}

// Vectors of N pixels need runs of pixels that N divides, which makes every row's beginning as
// aligned as its tensor's, and tensors aligned for them.
template <int N>
bool divides_runs(const StampShape& shape) {
  return shape.run() % N == 0;
}
template <int N, class T>
bool aligned(const void* tensor) {
  return reinterpret_cast<uintptr_t>(tensor) % kAccessBytes<T, N> == 0;
}

// Pixels of a thread: 16 bytes of the output or its gradient, or two single accesses.
template <class T>
constexpr int kVectorPixels = kMaxWordBytes / static_cast<int>(sizeof(T));
constexpr int kScalarPixels = 2;

template <int N, class Places>
LaunchShape forward_grid(const StampShape& shape, int64_t pixels) {
  const int64_t blocks = ceil_div(shape.triggers, kForwardTriggers<N, Places>) * shape.channels *
                         ceil_div(shape.images, kImagesPerThread) *
                         ceil_div(pixels, kForwardThreads * N);
  return {blocks, kForwardThreads, 0};
}

template <class Shared>
LaunchShape backward_grid(const StampShape& shape, int64_t pixels) {
  const int64_t chunks = batch_chunks(shape.images);
  const int64_t warps = chunks < 1 ? 1 : chunks < kMaxBackwardWarps ? chunks : kMaxBackwardWarps;
  const int64_t blocks = shape.triggers * ceil_div(pixels, Shared::kTile);
  return {blocks, static_cast<int>(warps) * kWarpSize, Shared::bytes(static_cast<int>(warps))};
}

// launch(kernel, LaunchShape) -> bool; false where there is no kernel for the types. With a crop
// only the scalar form: the rows of a box begin anywhere.
template <class Launch>
bool dispatch_stamp_forward(const StampForwardParams& params, const Launch& launch) {
  const StampShape& shape = params.shape;
  const StampCrop& crop = params.crop;
  return with_float_types(params.compute_dtype, params.output_dtype, [&](auto compute, auto out) {
    using T = typename decltype(compute)::Type;
    using Output = typename decltype(out)::Type;
    return with_image_type(params.image_dtype, [&](auto image) {
      using Image = typename decltype(image)::Type;
      if (crop.corners != nullptr) {
        const int64_t pixels = params.only_box ? crop.height * crop.width : shape.pixels();
        return launch(&stamp_forward<T, Image, Output, kScalarPixels, 1, CropPlaces>,
                      forward_grid<kScalarPixels, CropPlaces>(shape, pixels));
      }
      constexpr int N = kVectorPixels<Output>;
      const bool vectors = divides_runs<N>(shape) && aligned<N, Image>(params.images) &&
                           aligned<N, T>(params.mask_logits) &&
                           aligned<N, T>(params.pattern_logits) &&
                           aligned<N, Output>(params.output);
      return vectors ? launch(&stamp_forward<T, Image, Output, N, N, WholePlaces>,
                              forward_grid<N, WholePlaces>(shape, shape.pixels()))
                     : launch(&stamp_forward<T, Image, Output, kScalarPixels, 1, WholePlaces>,
                              forward_grid<kScalarPixels, WholePlaces>(shape, shape.pixels()));
    });
  });
}

template <class Launch>
bool dispatch_stamp_backward(const StampBackwardParams& params, const Launch& launch) {
  const StampShape& shape = params.shape;
  const StampCrop& crop = params.crop;
  return with_float_types(params.compute_dtype, params.gradient_dtype, [&](auto compute, auto out) {
    using T = typename decltype(compute)::Type;
    using Gradient = typename decltype(out)::Type;
    return with_image_type(params.image_dtype, [&](auto image) {
      using Image = typename decltype(image)::Type;
      using AnyChannels = BackwardShared<T, 1, kMaxChannels>;
      using Scalar = BackwardShared<T, kScalarPixels, 3>;
      if (crop.corners != nullptr) {
        const int64_t pixels = crop.height * crop.width;
        return shape.channels == 3
                   ? launch(&stamp_backward<T, Image, Gradient, kScalarPixels, 1, 3, CropPlaces>,
                            backward_grid<Scalar>(shape, pixels))
                   : launch(&stamp_backward<T, Image, Gradient, 1, 1, kMaxChannels, CropPlaces>,
                            backward_grid<AnyChannels>(shape, pixels));
      }
      const int64_t pixels = shape.pixels();
      if (shape.channels != 3) {
        return launch(&stamp_backward<T, Image, Gradient, 1, 1, kMaxChannels, WholePlaces>,
                      backward_grid<AnyChannels>(shape, pixels));
      }
      constexpr int N = kVectorPixels<Gradient>;
      const bool vectors = divides_runs<N>(shape) && aligned<N, Gradient>(params.gradient) &&
                           aligned<N, Image>(params.images);
      return vectors ? launch(&stamp_backward<T, Image, Gradient, N, N, 3, WholePlaces>,
                              backward_grid<BackwardShared<T, N, 3>>(shape, pixels))
                     : launch(&stamp_backward<T, Image, Gradient, kScalarPixels, 1, 3, WholePlaces>,
                              backward_grid<Scalar>(shape, pixels));
    });
  });
}

}  // namespace pydetox::cuda

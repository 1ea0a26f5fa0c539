#pragma once

// Which instantiation of a kernel runs, on what grid.

#include <cstdint>

#include "csrc/common/launcher.h"
#include "csrc/stamp_triggers/cuda.cuh"

namespace pydetox::cuda {

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

// Pixels of a thread: 16 bytes of the output; for its gradient at most four, whose sums and
// sigmoids leave registers for other threads; where rows of patches are too short for that, such as
// 14, two pairs; or two single accesses.
template <class T>
constexpr int kVectorPixels = kMaxWordBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kBackwardPixels = kVectorPixels<T> < 4 ? kVectorPixels<T> : 4;
constexpr int kPairedPixels = 4;
constexpr int kScalarPixels = 2;

template <int N>
struct Number {
  static constexpr int value = N;
};

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

// launch(kernel, parameters, LaunchShape) -> bool; false where there is no kernel for the types.
// With a crop only the scalar form: the rows of a box begin anywhere.
template <class T, class Output, class Launch>
bool launch_stamp_forward(const StampForwardParams& params, const Launch& launch) {
  const StampShape& shape = params.shape;
  const StampCrop& crop = params.crop;
  bool done = false;
  with_image_type(params.image_dtype, [&](auto image) {
    using Image = typename decltype(image)::Type;
    if (crop.corners != nullptr) {
      const int64_t pixels = params.only_box ? crop.height * crop.width : shape.pixels();
      done = launch(&stamp_forward<T, Image, Output, kScalarPixels, 1, CropPlaces>, params,
                    forward_grid<kScalarPixels, CropPlaces>(shape, pixels));
      return;
    }
    const auto run = [&](auto pixels, auto together) {
      constexpr int N = pixels.value, Run = together.value;
      done = launch(&stamp_forward<T, Image, Output, N, Run, WholePlaces>, params,
                    forward_grid<N, WholePlaces>(shape, shape.pixels()));
    };
    const auto fits = [&](auto together) {
      constexpr int Run = together.value;
      return divides_runs<Run>(shape) && aligned<Run, Image>(params.images) &&
             aligned<Run, T>(params.mask_logits) && aligned<Run, T>(params.pattern_logits) &&
             aligned<Run, Output>(params.output);
    };
    constexpr Number<kVectorPixels<Output>> kVector;
    if (fits(kVector)) return run(kVector, kVector);
    if constexpr (kVector.value > 2) {
      if (fits(Number<2>{})) return run(Number<kPairedPixels>{}, Number<2>{});
    }
    run(Number<kScalarPixels>{}, Number<1>{});
  });
  return done;
}

template <class T, class Gradient, class Launch>
bool launch_stamp_backward(const StampBackwardParams& params, const Launch& launch) {
  const StampShape& shape = params.shape;
  const StampCrop& crop = params.crop;
  bool done = false;
  with_image_type(params.image_dtype, [&](auto image) {
    using Image = typename decltype(image)::Type;
    using AnyChannels = BackwardShared<T, 1, 1, kMaxChannels>;
    using Scalar = BackwardShared<T, kScalarPixels, 1, 3>;
    if (crop.corners != nullptr) {
      const int64_t pixels = crop.height * crop.width;
      done = shape.channels == 3
                 ? launch(&stamp_backward<T, Image, Gradient, kScalarPixels, 1, 3, CropPlaces>,
                          params, backward_grid<Scalar>(shape, pixels))
                 : launch(&stamp_backward<T, Image, Gradient, 1, 1, kMaxChannels, CropPlaces>,
                          params, backward_grid<AnyChannels>(shape, pixels));
      return;
    }
    const int64_t pixels = shape.pixels();
    if (shape.channels != 3) {
      done = launch(&stamp_backward<T, Image, Gradient, 1, 1, kMaxChannels, WholePlaces>, params,
                    backward_grid<AnyChannels>(shape, pixels));
      return;
    }
    const auto run = [&](auto pixels_of_thread, auto together) {
      constexpr int N = pixels_of_thread.value, Run = together.value;
      done = launch(&stamp_backward<T, Image, Gradient, N, Run, 3, WholePlaces>, params,
                    backward_grid<BackwardShared<T, N, Run, 3>>(shape, pixels));
    };
    const auto fits = [&](auto together) {
      constexpr int Run = together.value;
      return divides_runs<Run>(shape) && aligned<Run, Gradient>(params.gradient) &&
             aligned<Run, Image>(params.images);
    };
    constexpr Number<kBackwardPixels<Gradient>> kVector;
    if (fits(kVector)) return run(kVector, kVector);
    if constexpr (kVector.value > 2) {
      if (fits(Number<2>{})) return run(Number<kPairedPixels>{}, Number<2>{});
    }
    run(Number<kScalarPixels>{}, Number<1>{});
  });
  return done;
}

// One translation unit for each pair of types and each direction: all of them in one would take
// minutes to compile.
template <class T, class Output>
int run_stamp_forward_as(const StampForwardParams& params, void* stream) {
  return with_launcher(
      stream, [&](const auto& launch) { return launch_stamp_forward<T, Output>(params, launch); });
}
template <class T, class Gradient>
int run_stamp_backward_as(const StampBackwardParams& params, void* stream) {
  return with_launcher(stream, [&](const auto& launch) {
    return launch_stamp_backward<T, Gradient>(params, launch);
  });
}

}  // namespace pydetox::cuda

#pragma once

// Kernels that stamp triggers and reduce the gradient of their logits; csrc/core/stamp.h has the
// maths and the order of the sums. Compiled by nvcc, and by the host compiler for the emulator.

#include <cstdint>

#include "csrc/core/stamp.h"
#include "csrc/cuda/memory.cuh"

namespace pydetox::cuda {

constexpr int kForwardThreads = 256;
// Triggers of a forward thread that has N pixels: that many outputs for one read of a pixel, as far
// as registers allow.
template <int N>
constexpr int kTriggersPerThread = N <= 4 ? 4 : 2;
constexpr int kImagesPerThread = 16;  // that many outputs for one evaluation of a sigmoid
constexpr int kWarpSize = 32;
constexpr int kMaxBackwardWarps = 8;

PYDETOX_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N pixels of one thread, among the pixels in the order of the output (group, inner). They come in
// N / Run runs that lie next to each other in every tensor: Run = N where all is aligned, so that a
// run is one vector access; Run = 1 where it is not, and then neighbouring threads take
// neighbouring pixels, which keeps accesses coalesced.
template <int N, int Run>
struct Pixels {
  static constexpr int kRuns = N / Run;
  int64_t plane[kRuns];   // offset in an [H, W] plane
  int64_t output[kRuns];  // offset in an output of one image, at channel 0
  bool inside[kRuns];

  // Where in a tile the j-th pixel of a thread lies.
  static __device__ __forceinline__ int in_tile(int j, int thread, int threads) {
    return (j / Run * threads + thread) * Run + j % Run;
  }

  __device__ __forceinline__ Pixels(const StampShape& shape, int64_t tile_begin, int thread,
                                    int threads) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int64_t pixel = tile_begin + in_tile(r * Run, thread, threads);
      const int64_t group = pixel / shape.inner();
      const int64_t inner = pixel % shape.inner();
      inside[r] = pixel < shape.pixels();
      plane[r] = shape.plane_offset(group, inner);
      output[r] = shape.output_offset(0, 0, group, 0, inner);
    }
  }

  // values[j] = base[offset of pixel j]; untouched outside of the image.
  template <class T>
  __device__ __forceinline__ void load_at(const T* base, const int64_t (&offset)[kRuns],
                                          T (&values)[N]) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (inside[r]) load<Run>(base + offset[r], values + r * Run);
    }
  }

  template <class T>
  __device__ __forceinline__ void store_output(T* base, const T (&values)[N]) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (inside[r]) store<Run>(base + output[r], values + r * Run);
    }
  }
};

// One thread: N pixels of one channel, up to kTriggersPerThread triggers whose blends stay in
// registers, up to kImagesPerThread images.
template <class T, class Image, class Output, int N, int Run>
__global__ void __launch_bounds__(kForwardThreads, 2)
    stamp_forward(const StampForwardParams params) {
  constexpr int kTriggers = kTriggersPerThread<N>;
  const StampShape& shape = params.shape;
  // Blocks that share an image's pixels (triggers) or a mask (channels) run next to each other and
  // find them in the L2 cache.
  int64_t block = blockIdx.x;
  const int64_t trigger_tiles = ceil_div(shape.triggers, kTriggers);
  const int64_t k_begin = block % trigger_tiles * kTriggers;
  block /= trigger_tiles;
  const int64_t c = block % shape.channels;
  block /= shape.channels;
  const int64_t image_tiles = ceil_div(shape.images, kImagesPerThread);
  const int64_t b_begin = block % image_tiles * kImagesPerThread;
  const int64_t b_end =
      b_begin + kImagesPerThread < shape.images ? b_begin + kImagesPerThread : shape.images;
  const int64_t tile = block / image_tiles;

  const Pixels<N, Run> pixels(shape, tile * kForwardThreads * N, threadIdx.x, kForwardThreads);
  const int64_t plane_size = shape.pixels();
  const int64_t image_size = shape.channels * plane_size;
  const T mean = static_cast<T>(params.normalization.mean[c]);
  const T inverse_std = static_cast<T>(params.normalization.inverse_std[c]);

  Blend<T> blend[kTriggers][N];
#pragma unroll
  for (int t = 0; t < kTriggers; ++t) {
    const int64_t k = k_begin + t;
    T mask[N] = {}, pattern[N] = {};
    if (k < shape.triggers) {
      const auto* masks = static_cast<const T*>(params.mask_logits);
      const auto* patterns = static_cast<const T*>(params.pattern_logits);
      pixels.load_at(masks + k * plane_size, pixels.plane, mask);
      pixels.load_at(patterns + (k * shape.channels + c) * plane_size, pixels.plane, pattern);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      blend[t][j] = make_blend(sigmoid_of_twice(mask[j]), sigmoid_of_twice(pattern[j]));
    }
  }

  const auto* images = static_cast<const Image*>(params.images) + c * plane_size;
  auto* output = static_cast<Output*>(params.output) + c * shape.inner();
  for (int64_t b = b_begin; b < b_end; ++b) {
    Image image[N] = {};
    pixels.load_at(images + b * image_size, pixels.plane, image);
    T x[N];
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = load_pixel<T>(image[j]);
#pragma unroll
    for (int t = 0; t < kTriggers; ++t) {
      const int64_t k = k_begin + t;
      if (k >= shape.triggers) break;
      Output y[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        y[j] = store_as<Output>(clip_and_normalize(blend[t][j](x[j]), mean, inverse_std));
      }
      pixels.store_output(output + (k * shape.images + b) * image_size, y);
    }
  }
}

// What a block of the backward kernel shares: Channels + 1 rows of a tile of N * kWarpSize pixels,
// row 0 for the mask and the others for the pattern's channels.
template <class T, int N, int Channels>
struct BackwardShared {
  static constexpr int kTile = N * kWarpSize;
  static constexpr int kItems = (Channels + 1) * kTile;
  double sums[kItems];
  Sigmoid<T> sigmoids[kItems];
  T partials[kMaxBackwardWarps][kItems];  // as many as the block has warps: see bytes()

  static constexpr int64_t bytes(int warps) {
    return sizeof(BackwardShared) - (kMaxBackwardWarps - warps) * sizeof(T) * kItems;
  }
};

// One block: a tile of pixels of one trigger, all images and channels. A warp sums one chunk of
// kBatchChunk images at a time; then every item (row, pixel) has an owner, which adds the chunks'
// sums in ascending order. Neither the grid nor the number of warps changes a bit.
//
// Channels: exactly 3, or kMaxChannels for any number up to that.
template <class T, class Image, class Gradient, int N, int Run, int Channels>
__global__ void __launch_bounds__(kMaxBackwardWarps* kWarpSize, 1)
    stamp_backward(const StampBackwardParams params) {
  using Shared = BackwardShared<T, N, Channels>;
  Shared& shared = *shared_memory<Shared>();
  const StampShape& shape = params.shape;
  const int channels = Channels == 3 ? 3 : static_cast<int>(shape.channels);
  const int items = (channels + 1) * Shared::kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarpSize, warps = threads / kWarpSize, lane = thread % kWarpSize;
  // Blocks that share an image's pixels run next to each other and find them in the L2 cache.
  const int64_t k = blockIdx.x % shape.triggers;
  const int64_t tile_begin = blockIdx.x / shape.triggers * Shared::kTile;
  const int64_t plane_size = shape.pixels();
  const int64_t image_size = channels * plane_size;

  // Mask or pattern logits of this trigger, and where an item lies in them; -1 outside of the
  // image.
  const auto* mask_logits = static_cast<const T*>(params.mask_logits) + k * plane_size;
  const auto* pattern_logits = static_cast<const T*>(params.pattern_logits) + k * image_size;
  const auto offset_of = [&](int item) -> int64_t {
    const int64_t pixel = tile_begin + item % Shared::kTile;
    if (pixel >= plane_size) return -1;
    return shape.plane_offset(pixel / shape.inner(), pixel % shape.inner());
  };
  for (int item = thread; item < items; item += threads) {
    const int64_t offset = offset_of(item);
    const int row = item / Shared::kTile;
    T logit{};
    if (offset >= 0) {
      load<1>((row == 0 ? mask_logits : pattern_logits + (row - 1) * plane_size) + offset, &logit);
    }
    shared.sums[item] = 0;
    shared.sigmoids[item] = sigmoid_of_twice(logit);
  }
  __syncthreads();

  const Pixels<N, Run> pixels(shape, tile_begin, lane, kWarpSize);
  const auto* gradient = static_cast<const Gradient*>(params.gradient);
  const auto* images = static_cast<const Image*>(params.images);
  const int64_t chunks = batch_chunks(shape.images);
  for (int64_t first_chunk = 0; first_chunk < chunks; first_chunk += warps) {
    const int64_t chunk = first_chunk + warp;
    if (chunk < chunks) {
      T mask_sum[N] = {}, pattern_sum[Channels][N] = {};
      const int64_t b_begin = chunk * kBatchChunk;
      const int64_t b_end =
          b_begin + kBatchChunk < shape.images ? b_begin + kBatchChunk : shape.images;
#pragma unroll 2
      for (int64_t b = b_begin; b < b_end; ++b) {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          if (c >= channels) break;
          Gradient upstream[N] = {};
          Image image[N] = {};
          pixels.load_at(gradient + (k * shape.images + b) * image_size + c * shape.inner(),
                         pixels.output, upstream);
          pixels.load_at(images + b * image_size + c * plane_size, pixels.plane, image);
          const T inverse_std = static_cast<T>(params.normalization.inverse_std[c]);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int t = pixels.in_tile(j, lane, kWarpSize);
            const Sigmoid<T> mask = shared.sigmoids[t];
            const Sigmoid<T> pattern = shared.sigmoids[(c + 1) * Shared::kTile + t];
            const T x = load_pixel<T>(image[j]);
            const T g = blend_gradient(make_blend(mask, pattern)(x), load_gradient<T>(upstream[j]),
                                       inverse_std);
            mask_sum[j] += mask_term(g, pattern.value, x);
            pattern_sum[c][j] += g;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        T* partial = shared.partials[warp] + pixels.in_tile(j, lane, kWarpSize);
        partial[0] = mask_sum[j];
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          if (c < channels) partial[(c + 1) * Shared::kTile] = pattern_sum[c][j];
        }
      }
    }
    __syncthreads();  // the partial sums are there
    const int active =
        static_cast<int>(chunks - first_chunk < warps ? chunks - first_chunk : warps);
    for (int item = thread; item < items; item += threads) {
      double sum = shared.sums[item];
      for (int w = 0; w < active; ++w) sum += static_cast<double>(shared.partials[w][item]);
      shared.sums[item] = sum;
    }
    __syncthreads();  // the partial sums may be overwritten
  }

  auto* mask_gradient = static_cast<T*>(params.mask_logits_gradient) + k * plane_size;
  auto* pattern_gradient = static_cast<T*>(params.pattern_logits_gradient) + k * image_size;
  for (int item = thread; item < items; item += threads) {
    const int64_t offset = offset_of(item);
    if (offset < 0) continue;
    const int row = item / Shared::kTile;
    const Sigmoid<T> mask = shared.sigmoids[item % Shared::kTile];
    const T sum = static_cast<T>(shared.sums[item]);
    if (row == 0) {
      const T result = mask_logit_gradient(sum, mask);
      store<1>(mask_gradient + offset, &result);
    } else {
      const T result = pattern_logit_gradient(sum, mask, shared.sigmoids[item]);
      store<1>(pattern_gradient + (row - 1) * plane_size + offset, &result);
    }
  }
}

}  // namespace pydetox::cuda

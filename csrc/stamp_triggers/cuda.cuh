#pragma once

// Kernels that stamp triggers and reduce the gradient of their logits; csrc/stamp_triggers/core.h
// has the maths and the order of the sums. Compiled by nvcc, and by the host compiler for the
// emulator.

#include <cmath>
#include <cstdint>

#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/stamp_triggers/core.h"

namespace pydetox::cuda {

constexpr int kForwardThreads = 64;   // small blocks: every multiprocessor gets as many
constexpr int kImagesPerThread = 16;  // that many outputs for one evaluation of the sigmoids
constexpr int kMaxBackwardWarps = 8;

// Triggers of a forward thread that has N pixels: that many outputs for one read of a pixel, as far
// as registers allow.
template <int N>
constexpr int kTriggersPerThread = N <= 4 ? 4 : 2;
template <int N, class Places>
constexpr int kForwardTriggers = Places::kCropped ? 1 : kTriggersPerThread<N>;

// load_pixel, without the branch to a slow path that a division has on a GPU: one correction step
// gives exactly x / 255 for all 256 values of x (a test tries them all).
template <class T, class Image>
__device__ __forceinline__ T pixel_value(Image pixel) {
  return load_pixel<T>(pixel);
}
template <class T>
__device__ __forceinline__ T pixel_value(uint8_t pixel) {
  constexpr T kInverse = static_cast<T>(1) / static_cast<T>(255);
  const T x = static_cast<T>(pixel);
  const T quotient = x * kInverse;
  return fma(fma(-quotient, static_cast<T>(255), x), kInverse, quotient);
}

// store_as, with the GPU's own rounding to bfloat16 (the same; only a NaN's payload may differ).
template <class Output, class T>
__device__ __forceinline__ Output output_value(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Output) == sizeof(BFloat16)) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  }
#endif
  return store_as<Output>(value);
}

// Where a pixel lies.
struct Place {
  int64_t logit;   // offset in a plane of logits; negative: no trigger there
  int64_t plane;   // offset in an [H, W] plane
  int64_t output;  // offset in the output of one image, at channel 0
};
constexpr int64_t kNoLogit = -1;

// The pixels of an image, counted in the order of the output (group, inner), for logits of all of
// them.
struct WholePlaces {
  static constexpr bool kCropped = false;
  const StampShape& shape;

  __device__ __forceinline__ WholePlaces(const StampShape& s, const StampCrop&, int64_t, bool)
      : shape(s) {}
  __device__ __forceinline__ int64_t pixels() const { return shape.pixels(); }
  __device__ __forceinline__ int64_t logits() const { return shape.pixels(); }
  __device__ __forceinline__ Place operator()(int64_t pixel) const {
    if (shape.patch == 0) return {pixel, pixel, pixel};
    const int64_t group = pixel / shape.inner();
    const int64_t inner = pixel - group * shape.inner();
    const int64_t plane = shape.plane_offset(group, inner);
    return {plane, plane, shape.output_offset(0, 0, group, 0, inner)};
  }
};

// Either the pixels of trigger k's box, row by row, or all pixels of an image, where those outside
// of the box have no logit.
struct CropPlaces {
  static constexpr bool kCropped = true;
  const StampShape& shape;
  const StampCrop& crop;
  bool only_box;
  Corner corner;

  __device__ __forceinline__ CropPlaces(const StampShape& s, const StampCrop& c, int64_t k,
                                        bool only)
      : shape(s), crop(c), only_box(only) {
    int64_t given[2];
    load<1>(c.corners + 2 * k, &given[0]);
    load<1>(c.corners + 2 * k + 1, &given[1]);
    corner = c.inside(s, given);
  }
  __device__ __forceinline__ int64_t pixels() const { return only_box ? logits() : shape.pixels(); }
  __device__ __forceinline__ int64_t logits() const { return crop.height * crop.width; }
  __device__ __forceinline__ Place operator()(int64_t pixel) const {
    if (only_box) {
      const int64_t row = pixel / crop.width;
      const int64_t y = corner.top + row;
      const int64_t x = corner.left + pixel - row * crop.width;
      return {pixel, y * shape.width + x, shape.pixel_offset(y, x)};
    }
    Place place = WholePlaces(shape, crop, 0, false)(pixel);
    const int64_t row = place.plane / shape.width - corner.top;
    const int64_t column = place.plane % shape.width - corner.left;
    const bool in_box = row >= 0 && row < crop.height && column >= 0 && column < crop.width;
    place.logit = in_box ? row * crop.width + column : kNoLogit;
    return place;
  }
};

// N pixels of one thread, in N / Run runs that are contiguous in every tensor. Run = N where all is
// aligned: a run is one vector access. Run = 1 elsewhere: then neighbouring threads have
// neighbouring pixels, which keeps the accesses of a warp together.
template <int N, int Run, class Places>
struct Pixels {
  static constexpr int kRuns = N / Run;
  int64_t logit[kRuns];
  int64_t plane[kRuns];
  int64_t output[kRuns];
  bool inside[kRuns];

  // Where in a tile of N * threads pixels the thread's j-th one lies.
  static __device__ __forceinline__ int in_tile(int j, int thread, int threads) {
    return (j / Run * threads + thread) * Run + j % Run;
  }

  __device__ __forceinline__ Pixels(const Places& places, int64_t tile_begin, int thread,
                                    int threads) {
    PYDETOX_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int64_t pixel = tile_begin + in_tile(r * Run, thread, threads);
      inside[r] = pixel < places.pixels();
      const Place place = places(pixel);
      logit[r] = place.logit;
      plane[r] = place.plane;
      output[r] = place.output;
    }
  }

  // values[j] = base[offset of pixel j]; unchanged outside of the image.
  template <class T>
  __device__ __forceinline__ void gather(const T* base, const int64_t (&offset)[kRuns],
                                         T (&values)[N]) const {
    PYDETOX_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      if (inside[r]) load<Run>(base + offset[r], values + r * Run);
    }
  }

  // Whether there is a trigger at pixel j.
  __device__ __forceinline__ bool has_logit(int j) const {
    return !Places::kCropped || logit[j / Run] >= 0;
  }
  // values[j] = base[logit of pixel j]; unchanged where there is none.
  template <class T>
  __device__ __forceinline__ void gather_logits(const T* base, T (&values)[N]) const {
    PYDETOX_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      if (inside[r] && has_logit(r * Run)) load<Run>(base + logit[r], values + r * Run);
    }
  }

  template <class T>
  __device__ __forceinline__ void scatter(const T (&values)[N], T* base) const {
    PYDETOX_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      if (inside[r]) store<Run>(base + output[r], values + r * Run);
    }
  }
};

// One thread: N pixels of one channel, a few triggers whose blends stay in registers, up to
// kImagesPerThread images. With a crop every trigger has its box elsewhere: then it is one trigger.
template <class T, class Image, class Output, int N, int Run, class Places>
__global__ void __launch_bounds__(kForwardThreads, sizeof(Image) == 8 ? 6 : 8)
    stamp_forward(const StampForwardParams params) {
  constexpr int kTriggers = kForwardTriggers<N, Places>;
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
  const int64_t tile_begin = block / image_tiles * (kForwardThreads * N);

  const Places places(shape, params.crop, k_begin, params.only_box);
  const Pixels<N, Run, Places> pixels(places, tile_begin, static_cast<int>(threadIdx.x),
                                      kForwardThreads);
  const int64_t plane_size = shape.pixels();
  const int64_t image_size = shape.channels * plane_size;
  const T mean = static_cast<T>(params.normalization.mean[c]);
  const T inverse_std = static_cast<T>(params.normalization.inverse_std[c]);

  const int64_t logit_plane = places.logits();
  const auto* mask_logits = static_cast<const T*>(params.mask_logits);
  const auto* pattern_logits = static_cast<const T*>(params.pattern_logits) + c * logit_plane;
  Blend<T> blends[kTriggers][N] = {};
  PYDETOX_UNROLL
  for (int t = 0; t < kTriggers; ++t) {
    const int64_t k = k_begin + t;
    if (k >= shape.triggers) break;
    T mask[N] = {}, pattern[N] = {};
    pixels.gather_logits(mask_logits + k * logit_plane, mask);
    pixels.gather_logits(pattern_logits + k * shape.channels * logit_plane, pattern);
    PYDETOX_UNROLL
    for (int j = 0; j < N; ++j) {
      blends[t][j] = pixels.has_logit(j)
                         ? make_blend(sigmoid_of_twice(mask[j]), sigmoid_of_twice(pattern[j]))
                         : no_trigger<T>();
    }
  }

  const auto* images = static_cast<const Image*>(params.images) + c * plane_size;
  auto* output = static_cast<Output*>(params.output) + c * shape.inner();
  const bool own_images = params.image_stride != 0;
  // The pixels of image b: those of the first trigger where all have the same.
  const auto fetch = [&](int64_t b, Image(&image)[kTriggers][N]) {
    PYDETOX_UNROLL
    for (int t = 0; t < kTriggers; ++t) {
      const int64_t k = k_begin + t;
      if (k >= shape.triggers || (t > 0 && !own_images)) break;
      pixels.gather(images + k * params.image_stride + b * image_size, pixels.plane, image[t]);
    }
  };
  // The next image is on its way while this one is stamped.
  Image ahead[kTriggers][N] = {};
  if (b_begin < b_end) fetch(b_begin, ahead);
  for (int64_t b = b_begin; b < b_end; ++b) {
    Image image[kTriggers][N];
    PYDETOX_UNROLL
    for (int t = 0; t < kTriggers; ++t) {
      PYDETOX_UNROLL
      for (int j = 0; j < N; ++j) image[t][j] = ahead[t][j];
    }
    if (b + 1 < b_end) fetch(b + 1, ahead);
    T x[N] = {};
    PYDETOX_UNROLL
    for (int t = 0; t < kTriggers; ++t) {
      const int64_t k = k_begin + t;
      if (k >= shape.triggers) break;
      if (t == 0 || own_images) {
        PYDETOX_UNROLL
        for (int j = 0; j < N; ++j) x[j] = pixel_value<T>(image[t][j]);
      }
      Output y[N];
      PYDETOX_UNROLL
      for (int j = 0; j < N; ++j) {
        y[j] = output_value<Output>(clip_and_normalize(blends[t][j](x[j]), mean, inverse_std));
      }
      pixels.scatter(y, output + (k * shape.images + b) * image_size);
    }
  }
}

// What a block of the backward kernel shares: Channels + 1 rows of a tile of N * kWarpSize pixels,
// row 0 for the mask and the others for the pattern's channels.
template <class T, int N, int Run, int Channels>
struct BackwardShared {
  static constexpr int kTile = N * kWarpSize;
  // Where a row holds pixel t of the tile. Threads whose N pixels lie in a row would be N elements
  // apart, in the same banks; one empty place after every N puts them into different ones.
  static __device__ __forceinline__ int place(int t) { return Run > 1 ? t + t / Run : t; }
  static constexpr int kPlaces = Run > 1 ? kTile + kTile / Run : kTile;

  double sums[Channels + 1][kPlaces];
  Sigmoid<T> sigmoids[Channels + 1][kPlaces];
  T partials[kMaxBackwardWarps][Channels + 1][kPlaces];  // one for each warp that the block has

  static constexpr int64_t bytes(int warps) {
    return static_cast<int64_t>(sizeof(BackwardShared)) -
           (kMaxBackwardWarps - warps) * static_cast<int64_t>(sizeof(partials[0]));
  }
};

// One block: a tile of pixels of one trigger, all images and channels. A warp sums one chunk of
// kBatchChunk images at a time; then every pixel's owner adds the chunks' sums in ascending order.
// Neither the grid nor the number of warps changes a bit.
//
// Channels: exactly 3, or kMaxChannels for any number up to that. With a crop the pixels are those
// of the box.
template <class T, class Image, class Gradient, int N, int Run, int Channels, class Places>
__global__ void __launch_bounds__(kMaxBackwardWarps* kWarpSize, 1)
    stamp_backward(const StampBackwardParams params) {
  using Shared = BackwardShared<T, N, Run, Channels>;
  Shared& shared = *shared_memory<Shared>();
  const StampShape& shape = params.shape;
  const int channels = Channels == kMaxChannels ? static_cast<int>(shape.channels) : Channels;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int warps = threads / kWarpSize;
  // Blocks that share an image's pixels run next to each other and find them in the L2 cache.
  const int64_t k = blockIdx.x % shape.triggers;
  const int64_t tile_begin = blockIdx.x / shape.triggers * Shared::kTile;
  const int64_t plane_size = shape.pixels();
  const int64_t image_size = channels * plane_size;
  const Places places(shape, params.crop, k, /*only_box=*/true);
  const int64_t logit_plane = places.logits();

  // A pixel of the tile has one owner, who evaluates its sigmoids and finishes its sums.
  const auto* mask_logits = static_cast<const T*>(params.mask_logits) + k * logit_plane;
  const auto* pattern_logits =
      static_cast<const T*>(params.pattern_logits) + k * channels * logit_plane;
  for (int t = thread; t < Shared::kTile; t += threads) {
    const bool inside = tile_begin + t < logit_plane;
    const int64_t offset = places(tile_begin + t).logit;
    PYDETOX_UNROLL
    for (int row = 0; row <= Channels; ++row) {
      if (row > channels) break;
      const T* logits = row == 0 ? mask_logits : pattern_logits + (row - 1) * logit_plane;
      T logit{};
      if (inside) load<1>(logits + offset, &logit);
      shared.sums[row][Shared::place(t)] = 0;
      shared.sigmoids[row][Shared::place(t)] = sigmoid_of_twice(logit);
    }
  }
  __syncthreads();  // the sigmoids are there

  const Pixels<N, Run, Places> pixels(places, tile_begin, lane, kWarpSize);
  const auto* gradient =
      static_cast<const Gradient*>(params.gradient) + k * shape.images * image_size;
  const auto* images = static_cast<const Image*>(params.images) + k * params.image_stride;
  const int64_t chunks = batch_chunks(shape.images);
  for (int64_t first_chunk = 0; first_chunk < chunks; first_chunk += warps) {
    const int64_t chunk = first_chunk + warp;
    if (chunk < chunks) {
      // In registers: shared memory would be read once more for every image.
      Sigmoid<T> mask[N], pattern[Channels][N];
      PYDETOX_UNROLL
      for (int j = 0; j < N; ++j) {
        const int place = Shared::place(pixels.in_tile(j, lane, kWarpSize));
        mask[j] = shared.sigmoids[0][place];
        PYDETOX_UNROLL
        for (int c = 0; c < Channels; ++c) {
          if (c < channels) pattern[c][j] = shared.sigmoids[c + 1][place];
        }
      }
      T mask_sum[N] = {}, pattern_sum[Channels][N] = {};
      const int64_t b_begin = chunk * kBatchChunk;
      const int64_t b_end =
          b_begin + kBatchChunk < shape.images ? b_begin + kBatchChunk : shape.images;
      const auto fetch = [&](int64_t b, Gradient(&upstream)[Channels][N],
                             Image(&image)[Channels][N]) {
        PYDETOX_UNROLL
        for (int c = 0; c < Channels; ++c) {
          if (c >= channels) break;
          pixels.gather(gradient + b * image_size + c * shape.inner(), pixels.output, upstream[c]);
          pixels.gather(images + b * image_size + c * plane_size, pixels.plane, image[c]);
        }
      };
      // The next image is on its way while this one is summed.
      Gradient upstream_ahead[Channels][N] = {};
      Image image_ahead[Channels][N] = {};
      fetch(b_begin, upstream_ahead, image_ahead);
      for (int64_t b = b_begin; b < b_end; ++b) {
        Gradient upstream[Channels][N];
        Image image[Channels][N];
        PYDETOX_UNROLL
        for (int c = 0; c < Channels; ++c) {
          PYDETOX_UNROLL
          for (int j = 0; j < N; ++j) {
            upstream[c][j] = upstream_ahead[c][j];
            image[c][j] = image_ahead[c][j];
          }
        }
        if (b + 1 < b_end) fetch(b + 1, upstream_ahead, image_ahead);
        PYDETOX_UNROLL
        for (int c = 0; c < Channels; ++c) {
          if (c >= channels) break;
          const T inverse_std = static_cast<T>(params.normalization.inverse_std[c]);
          PYDETOX_UNROLL
          for (int j = 0; j < N; ++j) {
            const T x = pixel_value<T>(image[c][j]);
            const T g = passed_gradient(make_blend(mask[j], pattern[c][j])(x),
                                        load_gradient<T>(upstream[c][j]));
            mask_sum[j] += mask_term(g, inverse_std, pattern[c][j].value, x);
            pattern_sum[c][j] += g;
          }
        }
      }
      PYDETOX_UNROLL
      for (int j = 0; j < N; ++j) {
        const int place = Shared::place(pixels.in_tile(j, lane, kWarpSize));
        shared.partials[warp][0][place] = mask_sum[j];
        PYDETOX_UNROLL
        for (int c = 0; c < Channels; ++c) {
          if (c < channels) shared.partials[warp][c + 1][place] = pattern_sum[c][j];
        }
      }
    }
    __syncthreads();  // the partial sums are there
    const int64_t left = chunks - first_chunk;
    const int active = left < warps ? static_cast<int>(left) : warps;
    for (int t = thread; t < Shared::kTile; t += threads) {
      PYDETOX_UNROLL
      for (int row = 0; row <= Channels; ++row) {
        if (row > channels) break;
        const int place = Shared::place(t);
        double sum = shared.sums[row][place];
        for (int w = 0; w < active; ++w) sum += static_cast<double>(shared.partials[w][row][place]);
        shared.sums[row][place] = sum;
      }
    }
    __syncthreads();  // the partial sums may be overwritten
  }

  auto* mask_gradient = static_cast<T*>(params.mask_logits_gradient) + k * logit_plane;
  auto* pattern_gradient =
      static_cast<T*>(params.pattern_logits_gradient) + k * channels * logit_plane;
  for (int t = thread; t < Shared::kTile; t += threads) {
    if (tile_begin + t >= logit_plane) break;
    const int64_t offset = places(tile_begin + t).logit;
    const int place = Shared::place(t);
    const Sigmoid<T> mask = shared.sigmoids[0][place];
    const T mask_result = mask_logit_gradient(shared.sums[0][place], mask);
    store<1>(mask_gradient + offset, &mask_result);
    PYDETOX_UNROLL
    for (int c = 0; c < Channels; ++c) {
      if (c >= channels) break;
      const T result =
          pattern_logit_gradient(shared.sums[c + 1][place], params.normalization.inverse_std[c],
                                 mask, shared.sigmoids[c + 1][place]);
      store<1>(pattern_gradient + c * logit_plane + offset, &result);
    }
  }
}

}  // namespace pydetox::cuda

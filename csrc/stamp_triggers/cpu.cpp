// Forward and backward of stamping whole images, for one instruction set (see csrc/common/vec.h).
//
// An item is a tile of pixels times a block of triggers. It reads its pixels of every image once,
// converts them to the compute type in output order, and then lets each trigger pass over them: the
// trigger's mask and pattern are computed once per tile, not once per image, and what is streamed
// from or to memory is the output or the upstream gradient alone. (Where every trigger has images
// of its own, each reads its own.)

#include "csrc/stamp_triggers/cpu_tile.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// Outputs from this size on are written past the caches.
constexpr int64_t kStreamFromBytes = 8 << 20;

// The tile's pixels of every image, the first of which begins at element `first`.
template <class T>
void load_images(const StampShape& shape, const Tile& tile, const void* images, DType dtype,
                 int64_t first, T* pixels) {
  with_image_type(dtype, [&](auto type) {
    using Pixel = typename decltype(type)::Type;
    for (int64_t b = 0; b < shape.images; ++b) {
      gather(shape, tile,
             static_cast<const Pixel*>(images) + first + b * shape.channels * shape.pixels(),
             shape.channels, pixels + b * shape.channels * tile.pixels(),
             [](Pixel pixel) { return load_pixel<T>(pixel); });
    }
  });
}

// kClean: no trigger anywhere, only the normalised images.
template <class T, class Out, bool kClean>
void forward_items(const StampForwardParams& p, const StampTiling& tiling, int64_t begin,
                   int64_t end) {
  const StampShape& shape = p.shape;
  const int64_t tile_pixels = tiling.tile_groups * tiling.tile_inner;
  const int64_t elements = shape.triggers * shape.images * shape.channels * shape.pixels();
  const bool streamed = elements * static_cast<int64_t>(sizeof(Out)) >= kStreamFromBytes;
  Scratch<T> pixels(shape.images * shape.channels * tile_pixels);
  TriggerTile<T> trigger(shape, tile_pixels);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile(shape, tiling, item);
    if constexpr (kClean) trigger.clear(tile);
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      if (k == tile.trigger || p.image_stride != 0) {
        load_images(shape, tile, p.images, p.image_dtype, k * p.image_stride, pixels.get());
      }
      if constexpr (!kClean) {
        trigger.compute(shape, tile, static_cast<const T*>(p.mask_logits),
                        static_cast<const T*>(p.pattern_logits), k);
      }
      const T* x = pixels.get();
      for (int64_t b = 0; b < shape.images; ++b) {
        for (int64_t g = 0; g < tile.groups; ++g) {
          for (int64_t c = 0; c < shape.channels; ++c, x += tile.width) {
            Out* y = static_cast<Out*>(p.output) +
                     shape.output_offset(k, b, tile.group + g, c, tile.inner);
            stamp_run(trigger.keep(tile, g), trigger.add(tile, g, c), x,
                      static_cast<T>(p.normalization.mean[c]),
                      static_cast<T>(p.normalization.inverse_std[c]), y, tile.width, streamed);
          }
        }
      }
    }
  }
  if (streamed) fence();
}

template <class T, class In>
void backward_items(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin,
                    int64_t end) {
  const StampShape& shape = p.shape;
  const int64_t channels = shape.channels;
  const int64_t tile_pixels = tiling.tile_groups * tiling.tile_inner;
  const auto* upstream = static_cast<const In*>(p.gradient);
  Scratch<T> pixels(shape.images * channels * tile_pixels);
  TriggerTile<T> trigger(shape, tile_pixels);
  TileGradients<T> sums(shape, tile_pixels);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile(shape, tiling, item);
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      if (k == tile.trigger || p.image_stride != 0) {
        load_images(shape, tile, p.images, p.image_dtype, k * p.image_stride, pixels.get());
      }
      trigger.compute(shape, tile, static_cast<const T*>(p.mask_logits),
                      static_cast<const T*>(p.pattern_logits), k);
      sums.clear(tile);

      const T* x = pixels.get();
      for (int64_t b = 0; b < shape.images; ++b) {
        for (int64_t g = 0; g < tile.groups; ++g) {
          const In* gradient = upstream + shape.output_offset(k, b, tile.group + g, 0, tile.inner);
          for (int64_t c = 0; c < channels; ++c, x += tile.width) {
            const In* next = gradient + shape.inner();
            if (c + 1 == channels && g + 1 == tile.groups && b + 1 < shape.images) {
              next = upstream + shape.output_offset(k, b + 1, tile.group, 0, tile.inner);
            }
            accumulate_run(trigger.keep(tile, g), trigger.add(tile, g, c),
                           trigger.pattern(tile, g, c), x, gradient, next,
                           static_cast<T>(p.normalization.inverse_std[c]), sums.mask_sum(tile, g),
                           sums.pattern_sum(tile, g, c), tile.width);
            gradient = next;
          }
        }
        sums.end_image(tile, b, shape.images);
      }
      sums.write(p, shape, tile, trigger, k);
    }
  }
}

// ---- dtypes ----

template <bool kClean>
void forward(const StampForwardParams& p, const StampTiling& tiling, int64_t begin, int64_t end) {
  with_float_types(p.compute_dtype, p.output_dtype, [&](auto compute, auto out) {
    forward_items<typename decltype(compute)::Type, typename decltype(out)::Type, kClean>(
        p, tiling, begin, end);
  });
}

void backward(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin, int64_t end) {
  with_float_types(p.compute_dtype, p.gradient_dtype, [&](auto compute, auto gradient) {
    backward_items<typename decltype(compute)::Type, typename decltype(gradient)::Type>(p, tiling,
                                                                                        begin, end);
  });
}

}  // namespace

extern const StampKernels kStampKernels;
const StampKernels kStampKernels{forward<false>, forward<true>, forward_box, backward,
                                 backward_box};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

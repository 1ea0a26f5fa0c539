// Forward and backward of stamping inside the triggers' boxes, for one instruction set (see
// csrc/common/vec.h).
//
// An item is a stretch of the box's pixels, in the box's own order, times a block of triggers.
// Every trigger has its box elsewhere, so each collects its pixels of the images (and of the
// upstream gradient) into one piece, runs the loops of whole images over it, and distributes the
// result.

#include "csrc/stamp_triggers/cpu_tile.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// The pixels of a tile of one trigger's box, in runs that are neighbours in the tile, in the
// images' planes and in the output.
class Window {
 public:
  explicit Window(int64_t tile_pixels) : runs_(tile_pixels) {}

  void place(const StampShape& shape, const StampCrop& crop, const Tile& tile, int64_t k) {
    const Corner corner = crop.inside(shape, crop.corners + 2 * k);
    count_ = 0;
    for (int64_t s = 0; s < tile.width;) {
      const int64_t pixel = tile.inner + s;
      const int64_t y = corner.top + pixel / crop.width;
      const int64_t x = corner.left + pixel % crop.width;
      int64_t length = crop.width - pixel % crop.width;
      if (tile.width - s < length) length = tile.width - s;
      if (shape.patch > 0 && shape.patch - x % shape.patch < length) {
        length = shape.patch - x % shape.patch;
      }
      runs_.get()[count_++] = {s, y * shape.width + x, shape.pixel_offset(y, x), length};
      s += length;
    }
  }

  // One channel of one image, as numbers of the compute type.
  template <class T, class Pixel>
  void gather_pixels(const Pixel* plane, T* to) const {
    for_each([&](const Run& run) {
      for (int64_t i = 0; i < run.length; ++i) {
        to[run.tile + i] = load_pixel<T>(plane[run.plane + i]);
      }
    });
  }
  // One channel of one image of the output, or of its gradient. Rows of a box lie far apart: those
  // of the channel that comes next are asked for at the same time.
  template <class Out>
  void gather(const Out* output, const Out* next, Out* to) const {
    for_each([&](const Run& run) {
      prefetch<0>(next + run.output, run.length);
      memcpy(to + run.tile, output + run.output, run.length * sizeof(Out));
    });
  }
  template <class Out>
  void scatter(const Out* from, Out* output, const Out* next) const {
    for_each([&](const Run& run) {
      prefetch<1>(next + run.output, run.length);
      memcpy(output + run.output, from + run.tile, run.length * sizeof(Out));
    });
  }

 private:
  struct Run {
    int64_t tile, plane, output, length;
  };
  template <int kForWriting, class Out>
  static void prefetch(const Out* from, int64_t count) {
    const auto* bytes = reinterpret_cast<const char*>(from);
    const int64_t size = count * static_cast<int64_t>(sizeof(Out));
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i, kForWriting, 2);
  }
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t r = 0; r < count_; ++r) visit(runs_.get()[r]);
  }

  int64_t count_ = 0;
  Scratch<Run> runs_;
};

// From one channel of the output to the next, over the end of an image; 0 behind the last.
PYDETOX_HD int64_t next_channel(const StampShape& shape, int64_t b, int64_t c) {
  if (c + 1 < shape.channels) return shape.inner();
  if (b + 1 == shape.images) return 0;
  return shape.output_offset(0, 1, 0, 0, 0) - shape.output_offset(0, 0, 0, c, 0);
}

// The window's pixels of every image of trigger k: [B, C, tile width].
template <class T, class Params>
void load_images(const Params& p, const Window& window, const Tile& tile, int64_t k, T* pixels) {
  with_image_type(p.image_dtype, [&](auto type) {
    using Pixel = typename decltype(type)::Type;
    const auto* images = static_cast<const Pixel*>(p.images) + k * p.image_stride;
    for (int64_t plane = 0; plane < p.shape.images * p.shape.channels; ++plane) {
      window.gather_pixels(images + plane * p.shape.pixels(), pixels + plane * tile.width);
    }
  });
}

template <class T, class Out>
void forward_items(const StampForwardParams& p, const StampTiling& tiling, int64_t begin,
                   int64_t end) {
  const StampShape& shape = p.shape;
  const StampShape box = p.crop.box(shape);
  Scratch<T> pixels(shape.images * shape.channels * tiling.tile_inner);
  Scratch<Out> stamped(tiling.tile_inner);
  TriggerTile<T> trigger(box, tiling.tile_inner);
  Window window(tiling.tile_inner);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile(box, tiling, item);
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      window.place(shape, p.crop, tile, k);
      load_images(p, window, tile, k, pixels.get());
      trigger.compute(box, tile, static_cast<const T*>(p.mask_logits),
                      static_cast<const T*>(p.pattern_logits), k);
      const T* x = pixels.get();
      for (int64_t b = 0; b < shape.images; ++b) {
        for (int64_t c = 0; c < shape.channels; ++c, x += tile.width) {
          stamp_run(trigger.keep(tile, 0), trigger.add(tile, 0, c), x,
                    static_cast<T>(p.normalization.mean[c]),
                    static_cast<T>(p.normalization.inverse_std[c]), stamped.get(), tile.width,
                    /*streamed=*/false);
          Out* y = static_cast<Out*>(p.output) + shape.output_offset(k, b, 0, c, 0);
          window.scatter(stamped.get(), y, y + next_channel(shape, b, c));
        }
      }
    }
  }
}

template <class T, class In>
void backward_items(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin,
                    int64_t end) {
  const StampShape& shape = p.shape;
  const StampShape box = p.crop.box(shape);
  Scratch<T> pixels(shape.images * shape.channels * tiling.tile_inner);
  Scratch<In> upstream(tiling.tile_inner);
  TriggerTile<T> trigger(box, tiling.tile_inner);
  TileGradients<T> sums(box, tiling.tile_inner);
  Window window(tiling.tile_inner);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile(box, tiling, item);
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      window.place(shape, p.crop, tile, k);
      load_images(p, window, tile, k, pixels.get());
      trigger.compute(box, tile, static_cast<const T*>(p.mask_logits),
                      static_cast<const T*>(p.pattern_logits), k);
      sums.clear(tile);
      const T* x = pixels.get();
      for (int64_t b = 0; b < shape.images; ++b) {
        for (int64_t c = 0; c < shape.channels; ++c, x += tile.width) {
          const In* g = static_cast<const In*>(p.gradient) + shape.output_offset(k, b, 0, c, 0);
          window.gather(g, g + next_channel(shape, b, c), upstream.get());
          accumulate_run(trigger.keep(tile, 0), trigger.add(tile, 0, c),
                         trigger.pattern(tile, 0, c), x, upstream.get(), upstream.get(),
                         static_cast<T>(p.normalization.inverse_std[c]), sums.mask_sum(tile, 0),
                         sums.pattern_sum(tile, 0, c), tile.width);
        }
        sums.end_image(tile, b, shape.images);
      }
      sums.write(p, box, tile, trigger, k);
    }
  }
}

}  // namespace

void forward_box(const StampForwardParams& p, const StampTiling& tiling, int64_t begin,
                 int64_t end) {
  with_float_types(p.compute_dtype, p.output_dtype, [&](auto compute, auto out) {
    forward_items<typename decltype(compute)::Type, typename decltype(out)::Type>(p, tiling, begin,
                                                                                  end);
  });
}

void backward_box(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin,
                  int64_t end) {
  with_float_types(p.compute_dtype, p.gradient_dtype, [&](auto compute, auto gradient) {
    backward_items<typename decltype(compute)::Type, typename decltype(gradient)::Type>(p, tiling,
                                                                                        begin, end);
  });
}

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

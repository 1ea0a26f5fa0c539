// Forward and backward of stamping for one instruction set (see csrc/cpu/vec.h).
//
// An item is a tile of pixels times a block of triggers. It reads its pixels of every image once,
// converts them to the compute type in output order, and then lets each trigger pass over them: the
// trigger's mask and pattern are computed once per tile, not once per image, and what is streamed
// from or to memory is the output or the upstream gradient alone.

#include <cstdlib>
#include <new>

#include "csrc/cpu/stamp.h"
#include "csrc/cpu/vec.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// Outputs from this size on are written past the caches.
constexpr int64_t kStreamFromBytes = 8 << 20;

// Uninitialised memory for one item, aligned for any vector and padded by one.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

struct Tile {
  int64_t group, groups;      // first group and how many
  int64_t inner, width;       // first inner position and how many
  int64_t trigger, triggers;  // first trigger and how many

  int64_t pixels() const { return groups * width; }
  Tile(const StampShape& shape, const StampTiling& tiling, int64_t item) {
    const auto part = [](int64_t index, int64_t size, int64_t whole, int64_t& begin,
                         int64_t& count) {
      begin = index * size;
      count = size < whole - begin ? size : whole - begin;
    };
    part(item % tiling.trigger_blocks, tiling.block_triggers, shape.triggers, trigger, triggers);
    item /= tiling.trigger_blocks;
    part(item % tiling.inner_tiles, tiling.tile_inner, shape.inner(), inner, width);
    part(item / tiling.inner_tiles, tiling.tile_groups, shape.groups(), group, groups);
  }
};

// Calls visit(plane_offset, tile_offset, count) for the stretches of the tile whose pixels are
// neighbours both in the H x W plane and in the tile.
template <class Visit>
PYDETOX_HD void for_each_run(const StampShape& shape, const Tile& tile, const Visit& visit) {
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int64_t s = 0; s < tile.width;) {
      const int64_t inner = tile.inner + s;
      const int64_t left_in_run = shape.run() - inner % shape.run();
      const int64_t count = left_in_run < tile.width - s ? left_in_run : tile.width - s;
      visit(shape.plane_offset(tile.group + g, inner), g, s, count);
      s += count;
    }
  }
}

// Planes [planes, H, W] -> tile order [groups, planes, width], each element through `convert`.
template <class To, class From, class Convert>
PYDETOX_HD void gather(const StampShape& shape, const Tile& tile, const From* from, int64_t planes,
                       To* to, const Convert& convert) {
  for (int64_t c = 0; c < planes; ++c) {
    for_each_run(shape, tile, [&](int64_t offset, int64_t g, int64_t s, int64_t count) {
      const From* source = from + c * shape.pixels() + offset;
      To* target = to + (g * planes + c) * tile.width + s;
      for (int64_t i = 0; i < count; ++i) target[i] = convert(source[i]);
    });
  }
}

// The way back: tile order -> planes.
template <class T>
PYDETOX_HD void scatter(const StampShape& shape, const Tile& tile, const T* from, int64_t planes,
                        T* to) {
  for (int64_t c = 0; c < planes; ++c) {
    for_each_run(shape, tile, [&](int64_t offset, int64_t g, int64_t s, int64_t count) {
      memcpy(to + c * shape.pixels() + offset, from + (g * planes + c) * tile.width + s,
             count * sizeof(T));
    });
  }
}

template <class T>
void load_images(const StampShape& shape, const Tile& tile, const void* images, DType dtype,
                 T* pixels) {
  const auto convert_from = [&](auto example) {
    using Pixel = decltype(example);
    for (int64_t b = 0; b < shape.images; ++b) {
      gather(shape, tile, static_cast<const Pixel*>(images) + b * shape.channels * shape.pixels(),
             shape.channels, pixels + b * shape.channels * tile.pixels(),
             [](Pixel pixel) { return load_pixel<T>(pixel); });
    }
  };
  switch (dtype) {
    case DType::kUInt8:
      return convert_from(uint8_t{});
    case DType::kBFloat16:
      return convert_from(BFloat16{});
    case DType::kFloat32:
      return convert_from(float{});
    case DType::kFloat64:
      return convert_from(double{});
    default:
      return;  // csrc/ops/stamp_arguments.cpp lets no other type through
  }
}

// One trigger on one tile.
template <class T>
class TriggerTile {
 public:
  TriggerTile(const StampShape& shape, int64_t tile_pixels)
      : channels_(shape.channels),
        mask_(tile_pixels),
        keep_(tile_pixels),
        pattern_(tile_pixels * shape.channels),
        pattern_complement_(tile_pixels * shape.channels),
        add_(tile_pixels * shape.channels) {}

  void compute(const StampShape& shape, const Tile& tile, const T* mask_logits,
               const T* pattern_logits, int64_t k) {
    const auto same = [](T logit) { return logit; };
    gather(shape, tile, mask_logits + k * shape.pixels(), 1, mask_.get(), same);
    gather(shape, tile, pattern_logits + k * channels_ * shape.pixels(), channels_, pattern_.get(),
           same);
    squash(mask_.get(), keep_.get(), tile.pixels());
    squash(pattern_.get(), pattern_complement_.get(), tile.pixels() * channels_);
    for (int64_t g = 0; g < tile.groups; ++g) {
      for (int64_t c = 0; c < channels_; ++c) {
        const T* m = mask(tile, g);
        const T* p = pattern(tile, g, c);
        T* a = add_.get() + (g * channels_ + c) * tile.width;
        for (int64_t i = 0; i < tile.width; ++i) a[i] = m[i] * p[i];
      }
    }
  }

  const T* mask(const Tile& tile, int64_t g) const { return mask_.get() + g * tile.width; }
  const T* keep(const Tile& tile, int64_t g) const { return keep_.get() + g * tile.width; }
  const T* pattern(const Tile& tile, int64_t g, int64_t c) const {
    return pattern_.get() + (g * channels_ + c) * tile.width;
  }
  const T* pattern_complement(const Tile& tile, int64_t g, int64_t c) const {
    return pattern_complement_.get() + (g * channels_ + c) * tile.width;
  }
  const T* add(const Tile& tile, int64_t g, int64_t c) const {
    return add_.get() + (g * channels_ + c) * tile.width;
  }

 private:
  // Logits -> value and complement, in place. Scratch is padded: no tail.
  static void squash(T* value, T* complement, int64_t count) {
    constexpr int N = kLanes<T>;
    for (int64_t i = 0; i < count; i += N) {
      const auto s = sigmoid_of_twice(load<Vec<T, N>>(value + i));
      store(value + i, s.value);
      store(complement + i, s.complement);
    }
  }

  int64_t channels_;
  Scratch<T> mask_, keep_, pattern_, pattern_complement_, add_;
};

// ---- forward ----

// y[i] = clip_and_normalize(keep[i] * x[i] + add[i]) for one stretch of the output.
template <class T, class Out>
void stamp_run(const T* keep, const T* add, const T* x, T mean, T inverse_std, Out* y,
               int64_t count, bool streamed) {
  constexpr int N = kLanes<T>;
  const auto element = [&](auto lanes, int64_t i) {
    constexpr int n = decltype(lanes)::value;
    using V = Vec<T, n>;
    const Blend<V> blend{load<V>(keep + i), load<V>(add + i)};
    return narrow<Out, T, n>(clip_and_normalize(blend(load<V>(x + i)), mean, inverse_std));
  };
  int64_t i = 0;
  if (streamed) {
    constexpr uintptr_t kAlign = N * sizeof(Out) < 32 ? N * sizeof(Out) : 32;
    for (; i < count && reinterpret_cast<uintptr_t>(y + i) % kAlign != 0; ++i)
      y[i] = element(Width<1>{}, i);
    for (; i + N <= count; i += N) stream(y + i, element(Width<N>{}, i));
  } else {
    for (; i + N <= count; i += N) store(y + i, element(Width<N>{}, i));
  }
  for (; i < count; ++i) y[i] = element(Width<1>{}, i);
}

template <class T, class Out>
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
    load_images(shape, tile, p.images, p.image_dtype, pixels.get());
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      trigger.compute(shape, tile, static_cast<const T*>(p.mask_logits),
                      static_cast<const T*>(p.pattern_logits), k);
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

// ---- backward ----

// Adds one stretch's terms to the running sums of its chunk, and asks for the stretch that comes
// next into the second-level cache: stretches lie far apart, and the hardware's own prefetching
// starts anew with each.
template <class T, class In>
void accumulate_run(const T* keep, const T* add, const T* pattern, const T* x, const In* gradient,
                    const In* next_gradient, T inverse_std, T* mask_sum, T* pattern_sum,
                    int64_t count) {
  constexpr int N = kLanes<T>;
  const auto step = [&](auto lanes, int64_t i) {
    constexpr int n = decltype(lanes)::value;
    using V = Vec<T, n>;
    const V pixel = load<V>(x + i);
    const V blended = Blend<V>{load<V>(keep + i), load<V>(add + i)}(pixel);
    const V g = passed_gradient(blended, widen<In, T, n>(gradient + i));
    store(mask_sum + i,
          load<V>(mask_sum + i) + mask_term(g, inverse_std, load<V>(pattern + i), pixel));
    store(pattern_sum + i, load<V>(pattern_sum + i) + g);
  };
  int64_t i = 0;
  for (; i + N <= count; i += N) {
    __builtin_prefetch(next_gradient + i, 0, 2);
    step(Width<N>{}, i);
  }
  for (; i < count; ++i) step(Width<1>{}, i);
}

// Sums over the images, for one trigger on one tile: in T inside a chunk, in double over the
// chunks.
template <class T>
class ChunkedSums {
 public:
  explicit ChunkedSums(int64_t capacity) : chunk_(capacity), total_(capacity) {}
  void clear(int64_t count) {
    memset(chunk_.get(), 0, count * sizeof(T));
    memset(total_.get(), 0, count * sizeof(double));
  }
  void end_chunk(int64_t count) {
    T* __restrict chunk = chunk_.get();
    double* __restrict total = total_.get();
    for (int64_t i = 0; i < count; ++i) {
      total[i] += static_cast<double>(chunk[i]);
      chunk[i] = 0;
    }
  }
  T* chunk() const { return chunk_.get(); }
  const double* total() const { return total_.get(); }

 private:
  Scratch<T> chunk_;
  Scratch<double> total_;
};

template <class T>
void finish_mask(const double* __restrict sum, const T* __restrict mask, const T* __restrict keep,
                 T* __restrict gradient, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    gradient[i] = mask_logit_gradient(sum[i], Sigmoid<T>{mask[i], keep[i]});
  }
}

template <class T>
void finish_pattern(const double* __restrict sum, double inverse_std, const T* __restrict mask,
                    const T* __restrict keep, const T* __restrict pattern,
                    const T* __restrict complement, T* __restrict gradient, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    gradient[i] = pattern_logit_gradient(sum[i], inverse_std, Sigmoid<T>{mask[i], keep[i]},
                                         Sigmoid<T>{pattern[i], complement[i]});
  }
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
  ChunkedSums<T> mask_sum(tile_pixels), pattern_sum(tile_pixels * channels);
  Scratch<T> mask_gradient(tile_pixels), pattern_gradient(tile_pixels * channels);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile(shape, tiling, item);
    load_images(shape, tile, p.images, p.image_dtype, pixels.get());
    for (int64_t k = tile.trigger; k < tile.trigger + tile.triggers; ++k) {
      trigger.compute(shape, tile, static_cast<const T*>(p.mask_logits),
                      static_cast<const T*>(p.pattern_logits), k);
      mask_sum.clear(tile.pixels());
      pattern_sum.clear(tile.pixels() * channels);

      const T* x = pixels.get();
      for (int64_t b = 0; b < shape.images; ++b) {
        for (int64_t g = 0; g < tile.groups; ++g) {
          const In* gradient = upstream + shape.output_offset(k, b, tile.group + g, 0, tile.inner);
          for (int64_t c = 0; c < channels; ++c, x += tile.width) {
            const In* next = gradient + shape.inner();
            if (c + 1 == channels && g + 1 == tile.groups && b + 1 < shape.images) {
              next = upstream + shape.output_offset(k, b + 1, tile.group, 0, tile.inner);
            }
            const int64_t plane = (g * channels + c) * tile.width;
            accumulate_run(
                trigger.keep(tile, g), trigger.add(tile, g, c), trigger.pattern(tile, g, c), x,
                gradient, next, static_cast<T>(p.normalization.inverse_std[c]),
                mask_sum.chunk() + g * tile.width, pattern_sum.chunk() + plane, tile.width);
            gradient = next;
          }
        }
        if ((b + 1) % kBatchChunk == 0 || b + 1 == shape.images) {
          mask_sum.end_chunk(tile.pixels());
          pattern_sum.end_chunk(tile.pixels() * channels);
        }
      }

      for (int64_t g = 0; g < tile.groups; ++g) {
        finish_mask(mask_sum.total() + g * tile.width, trigger.mask(tile, g), trigger.keep(tile, g),
                    mask_gradient.get() + g * tile.width, tile.width);
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t plane = (g * channels + c) * tile.width;
          finish_pattern(pattern_sum.total() + plane, p.normalization.inverse_std[c],
                         trigger.mask(tile, g), trigger.keep(tile, g), trigger.pattern(tile, g, c),
                         trigger.pattern_complement(tile, g, c), pattern_gradient.get() + plane,
                         tile.width);
        }
      }
      scatter(shape, tile, mask_gradient.get(), 1,
              static_cast<T*>(p.mask_logits_gradient) + k * shape.pixels());
      scatter(shape, tile, pattern_gradient.get(), channels,
              static_cast<T*>(p.pattern_logits_gradient) + k * channels * shape.pixels());
    }
  }
}

// ---- dtypes ----

void forward(const StampForwardParams& p, const StampTiling& tiling, int64_t begin, int64_t end) {
  if (p.compute_dtype == DType::kFloat64)
    return forward_items<double, double>(p, tiling, begin, end);
  if (p.output_dtype == DType::kBFloat16)
    return forward_items<float, BFloat16>(p, tiling, begin, end);
  return forward_items<float, float>(p, tiling, begin, end);
}

void backward(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin, int64_t end) {
  if (p.compute_dtype == DType::kFloat64)
    return backward_items<double, double>(p, tiling, begin, end);
  if (p.gradient_dtype == DType::kBFloat16)
    return backward_items<float, BFloat16>(p, tiling, begin, end);
  return backward_items<float, float>(p, tiling, begin, end);
}

}  // namespace

extern const StampKernels kStampKernels;
const StampKernels kStampKernels{forward, backward};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

#pragma once

// What the kernels of whole images (stamp_kernels.cpp) and of boxes (stamp_box_kernels.cpp) share:
// tiles, one trigger on a tile, and the two inner loops. For one instruction set
// (csrc/common/vec.h).

#include <cstdlib>
#include <new>

#include "csrc/common/vec.h"
#include "csrc/stamp_triggers/cpu.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {

// stamp_box_kernels.cpp; tilings are those of the box.
void forward_box(const StampForwardParams& p, const StampTiling& tiling, int64_t begin,
                 int64_t end);
void backward_box(const StampBackwardParams& p, const StampTiling& tiling, int64_t begin,
                  int64_t end);

namespace {

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

  // No trigger anywhere on the tile.
  void clear(const Tile& tile) {
    const auto none = no_trigger<T>();
    for (int64_t i = 0; i < tile.pixels(); ++i) keep_.get()[i] = none.keep;
    for (int64_t i = 0; i < tile.pixels() * channels_; ++i) add_.get()[i] = none.add;
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

// The sums of one trigger on one tile, and from them the gradients of its logits.
template <class T>
class TileGradients {
 public:
  TileGradients(const StampShape& shape, int64_t tile_pixels)
      : channels_(shape.channels),
        mask_sum_(tile_pixels),
        pattern_sum_(tile_pixels * shape.channels),
        mask_gradient_(tile_pixels),
        pattern_gradient_(tile_pixels * shape.channels) {}

  void clear(const Tile& tile) {
    mask_sum_.clear(tile.pixels());
    pattern_sum_.clear(tile.pixels() * channels_);
  }
  T* mask_sum(const Tile& tile, int64_t g) const { return mask_sum_.chunk() + g * tile.width; }
  T* pattern_sum(const Tile& tile, int64_t g, int64_t c) const {
    return pattern_sum_.chunk() + (g * channels_ + c) * tile.width;
  }
  // To be called after each image.
  void end_image(const Tile& tile, int64_t b, int64_t images) {
    if ((b + 1) % kBatchChunk != 0 && b + 1 != images) return;
    mask_sum_.end_chunk(tile.pixels());
    pattern_sum_.end_chunk(tile.pixels() * channels_);
  }

  // To the planes of trigger k; `shape` is the logits'.
  void write(const StampBackwardParams& p, const StampShape& shape, const Tile& tile,
             const TriggerTile<T>& trigger, int64_t k) {
    for (int64_t g = 0; g < tile.groups; ++g) {
      finish_mask(mask_sum_.total() + g * tile.width, trigger.mask(tile, g), trigger.keep(tile, g),
                  mask_gradient_.get() + g * tile.width, tile.width);
      for (int64_t c = 0; c < channels_; ++c) {
        const int64_t plane = (g * channels_ + c) * tile.width;
        finish_pattern(pattern_sum_.total() + plane, p.normalization.inverse_std[c],
                       trigger.mask(tile, g), trigger.keep(tile, g), trigger.pattern(tile, g, c),
                       trigger.pattern_complement(tile, g, c), pattern_gradient_.get() + plane,
                       tile.width);
      }
    }
    scatter(shape, tile, mask_gradient_.get(), 1,
            static_cast<T*>(p.mask_logits_gradient) + k * shape.pixels());
    scatter(shape, tile, pattern_gradient_.get(), channels_,
            static_cast<T*>(p.pattern_logits_gradient) + k * channels_ * shape.pixels());
  }

 private:
  int64_t channels_;
  ChunkedSums<T> mask_sum_, pattern_sum_;
  Scratch<T> mask_gradient_, pattern_gradient_;
};

}  // namespace
}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

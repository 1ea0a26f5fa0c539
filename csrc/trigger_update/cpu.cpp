// The passes of the triggers' update for one instruction set (see csrc/common/vec.h).

#include "csrc/trigger_update/cpu.h"

#include "csrc/common/vec.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

// signs[i] += sign of a[i] - b[i].
template <class T>
PYDETOX_HD void add_signs(const T* __restrict a, const T* __restrict b, int64_t count,
                          int8_t* __restrict signs) {
  for (int64_t i = 0; i < count; ++i) {
    signs[i] = static_cast<int8_t>(signs[i] + (a[i] > b[i]) - (a[i] < b[i]));
  }
}

// The gradient of the total variation by m, from the logits: m grows with them.
template <class T>
void variation_signs(const T* logits, int64_t height, int64_t width, int64_t begin, int64_t end,
                     int8_t* signs) {
  memset(signs + begin, 0, static_cast<size_t>(end - begin));
  for (int64_t i = begin; i < end;) {
    const int64_t y = i / width, x = i % width;
    const int64_t row_end = (y + 1) * width, stop = row_end < end ? row_end : end;
    const int64_t count = stop - i;
    if (y > 0) add_signs(logits + i, logits + i - width, count, signs + i);
    if (y + 1 < height) add_signs(logits + i, logits + i + width, count, signs + i);
    const int64_t first = x > 0 ? i : i + 1;  // has a neighbour to the left
    if (first < stop) add_signs(logits + first, logits + first - 1, stop - first, signs + first);
    const int64_t last = stop < row_end ? stop : row_end - 1;  // ends what has one to the right
    if (i < last) add_signs(logits + i, logits + i + 1, last - i, signs + i);
    i = stop;
  }
}

template <class T>
double chunk_norm(const T* logits, int64_t count) {
  constexpr int N = kLanes<T>;
  double parts[kUpdateParts] = {};
  for (int64_t begin = 0; begin < count; begin += kUpdateParts) {
    const int64_t n = count - begin < kUpdateParts ? count - begin : kUpdateParts;
    T mask[kUpdateParts];
    int64_t i = 0;
    for (; i + N <= n; i += N) {
      store(mask + i, sigmoid_of_twice(load<Vec<T, N>>(logits + begin + i)).value);
    }
    for (; i < n; ++i) mask[i] = sigmoid_of_twice(logits[begin + i]).value;
    for (i = 0; i < n; ++i) parts[i] += static_cast<double>(mask[i]);
  }
  for (int half = kUpdateParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <class T>
void mask_items(const TriggerUpdateParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t k = item / p.mask_chunks(), from = item % p.mask_chunks() * kUpdateChunk;
    if (p.active[k] == 0) continue;
    const int64_t left = p.pixels() - from;
    const int64_t count = left < kUpdateChunk ? left : kUpdateChunk;
    const T* logits = static_cast<const T*>(p.mask.logits) + k * p.pixels();
    p.partials[item] = chunk_norm(logits + from, count);
    if (p.signs != nullptr) {
      variation_signs(logits, p.height, p.width, from, from + count, p.signs + k * p.pixels());
    }
  }
}

template <class T, int N>
PYDETOX_HD Vec<T, N> signs_as(const int8_t* signs) {
  if constexpr (N == 1) {
    return static_cast<T>(*signs);
  } else {
    return __builtin_convertvector(load<Vec<int8_t, N>>(signs), Vec<T, N>);
  }
}

// `count` elements from `offset` on. signs: of these elements, or null.
template <class T, bool kMask>
void move_run(const TriggerPlanes& planes, int64_t offset, int64_t count, const int8_t* signs,
              const AdamFactors<T>& f) {
  constexpr int N = kLanes<T>;
  T* logits = static_cast<T*>(planes.logits) + offset;
  const T* gradients = static_cast<const T*>(planes.gradient) + offset;
  T* firsts = static_cast<T*>(planes.first) + offset;
  T* seconds = static_cast<T*>(planes.second) + offset;
  const auto step = [&](auto lanes, int64_t i) {
    constexpr int n = decltype(lanes)::value;
    using V = Vec<T, n>;
    const AdamState<V> before{load<V>(logits + i), load<V>(firsts + i), load<V>(seconds + i)};
    V gradient = load<V>(gradients + i);
    if constexpr (kMask) {
      const V sign = signs == nullptr ? V{} : signs_as<T, n>(signs + i);
      gradient += penalty_gradient(before.logit, sign, f);
    }
    const auto after = adam_step(before, gradient, f, [](V v) { return root<T, n>(v); });
    store(logits + i, after.logit);
    store(firsts + i, after.first);
    store(seconds + i, after.second);
  };
  int64_t i = 0;
  for (; i + N <= count; i += N) step(Width<N>{}, i);
  for (; i < count; ++i) step(Width<1>{}, i);
}

template <class T>
void move_items(const TriggerUpdateParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t k = item / p.chunks();
    const TriggerStep& plan = p.plans[k];
    if (plan.moves == 0) continue;
    int64_t chunk = item % p.chunks();
    const bool mask = chunk < p.mask_chunks();
    if (!mask) chunk -= p.mask_chunks();
    const TriggerPlanes& planes = mask ? p.mask : p.pattern;
    const int64_t size = mask ? p.pixels() : p.channels * p.pixels();
    const int64_t from = chunk * kUpdateChunk, left = size - from;
    const int64_t count = left < kUpdateChunk ? left : kUpdateChunk;
    const int64_t offset = k * size + from;
    if (plan.best != 0) {
      memcpy(static_cast<T*>(planes.best) + offset, static_cast<const T*>(planes.logits) + offset,
             static_cast<size_t>(count) * sizeof(T));
    }
    const auto factors = adam_factors<T>(p, plan);
    if (mask) {
      move_run<T, true>(planes, offset, count, p.signs == nullptr ? nullptr : p.signs + offset,
                        factors);
    } else {
      move_run<T, false>(planes, offset, count, nullptr, factors);
    }
  }
}

void mask(const TriggerUpdateParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kFloat64) return mask_items<double>(p, begin, end);
  return mask_items<float>(p, begin, end);
}

void move(const TriggerUpdateParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kFloat64) return move_items<double>(p, begin, end);
  return move_items<float>(p, begin, end);
}

}  // namespace

extern const TriggerUpdateKernels kTriggerUpdateKernels;
const TriggerUpdateKernels kTriggerUpdateKernels{mask, move};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

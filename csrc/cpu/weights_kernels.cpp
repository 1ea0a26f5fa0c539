// Gram matrices, projections, sketches and linear combinations of weight differences for one
// instruction set (see csrc/cpu/vec.h).
//
// Every kernel walks through a chunk in blocks that stay in the first-level cache: the weights are
// widened to double there once, and whatever the operation needs is computed from that.

#include <cstdlib>
#include <new>

#include "csrc/cpu/vec.h"
#include "csrc/cpu/weights.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

constexpr int64_t kBlock = 128;       // for sums: differences of many models fit beside each other
constexpr int64_t kApplyBlock = 512;  // for results: fewer, longer stretches
// How far ahead memory is asked for, in elements.
constexpr int64_t kAhead = 1024;
// Sums run in this many interleaved parts on every instruction set: element i goes to part i % 8.
constexpr int kParts = 8;
constexpr int kLane = kLanes<double>;
using Doubles = Vec<double, kLane>;

// Aligned memory for `count` elements. (Not a std::vector: what is compiled out of line of it here
// could be the copy that the linker keeps for code that runs without these instructions.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Data of any alignment: a mapped file may place a tensor anywhere.
template <class T>
PYDETOX_HD double element(const char* from, int64_t index) {
  T value;
  memcpy(&value, from + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  if constexpr (sizeof(T) == 2) {
    return static_cast<double>(to_float(value));
  } else {
    return static_cast<double>(value);
  }
}

// Blocks of many lists lie far apart, and the hardware's own prefetching starts anew with each: the
// blocks after this one are asked for meanwhile, into the second-level cache.
template <class T, bool kMinus>
PYDETOX_HD void widen_as(const char* from, const double* __restrict base, int64_t count,
                         double* __restrict to) {
  constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += kPerLine) {
    __builtin_prefetch(from + (i + kAhead) * static_cast<int64_t>(sizeof(T)), 0, 2);
  }
  int64_t i = 0;
#if PYDETOX_VEC_BYTES > 0
  if constexpr (sizeof(T) == 4) {
    for (; i + kLane <= count; i += kLane) {
      Doubles wide = doubles_of_floats(from + i * 4);
      if constexpr (kMinus) wide -= load<Doubles>(base + i);
      store(to + i, wide);
    }
  }
#endif
  for (; i < count; ++i) to[i] = element<T>(from, i) - (kMinus ? base[i] : 0.0);
}

template <bool kMinus>
PYDETOX_HD void widen_any(const Source& source, int64_t begin, int64_t count, const double* base,
                          double* to) {
  const char* from = static_cast<const char*>(source.data) + begin * size_of(source.dtype);
  switch (source.dtype) {
    case DType::kFloat64:
      return widen_as<double, kMinus>(from, base, count, to);
    case DType::kFloat32:
      return widen_as<float, kMinus>(from, base, count, to);
    case DType::kBFloat16:
      return widen_as<BFloat16, kMinus>(from, base, count, to);
    default:
      return widen_as<Float16, kMinus>(from, base, count, to);
  }
}

// `count` elements from `begin` on, exactly.
PYDETOX_HD void widen(const Source& source, int64_t begin, int64_t count, double* to) {
  widen_any<false>(source, begin, count, nullptr, to);
}

// The same, less the base's.
PYDETOX_HD void difference_to(const Source& source, int64_t begin, int64_t count,
                              const double* base, double* to) {
  widen_any<true>(source, begin, count, base, to);
}

// sums[m, n][i % kParts] += a_m[i] * b_n[i] for M vectors a_m and N vectors b_n at once: what is
// loaded once serves several products, and the additions of one sum wait for each other, those of
// several do not. Vectors lie kBlock doubles apart, sums of one a_m kParts, of the next a_m `row`.
template <int M, int N>
PYDETOX_HD void dots(const double* a, const double* b, int64_t count, double* sums, int64_t row) {
  constexpr int kVectors = kParts / kLane;
  Doubles total[M][N][kVectors];
  PYDETOX_UNROLL
  for (int m = 0; m < M; ++m) {
    PYDETOX_UNROLL
    for (int n = 0; n < N; ++n) {
      PYDETOX_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        total[m][n][v] = load<Doubles>(sums + m * row + n * kParts + v * kLane);
      }
    }
  }
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    PYDETOX_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Doubles left[M];
      PYDETOX_UNROLL
      for (int m = 0; m < M; ++m) left[m] = load<Doubles>(a + m * kBlock + i + v * kLane);
      PYDETOX_UNROLL
      for (int n = 0; n < N; ++n) {
        const Doubles right = load<Doubles>(b + n * kBlock + i + v * kLane);
        PYDETOX_UNROLL
        for (int m = 0; m < M; ++m) total[m][n][v] = fused(left[m], right, total[m][n][v]);
      }
    }
  }
  PYDETOX_UNROLL
  for (int m = 0; m < M; ++m) {
    PYDETOX_UNROLL
    for (int n = 0; n < N; ++n) {
      double* sum = sums + m * row + n * kParts;
      PYDETOX_UNROLL
      for (int v = 0; v < kVectors; ++v) store(sum + v * kLane, total[m][n][v]);
      for (int64_t j = i; j < count; ++j) {
        double& part = sum[j % kParts];
        part = __builtin_fma(a[m * kBlock + j], b[n * kBlock + j], part);
      }
    }
  }
}

// M vectors a with each of `vectors` vectors b.
template <int M>
PYDETOX_HD void dots_with_all(const double* a, const double* b, int64_t vectors, int64_t count,
                              double* sums, int64_t row) {
  int64_t n = 0;
  for (; n + 4 <= vectors; n += 4) {
    dots<M, 4>(a, b + n * kBlock, count, sums + n * kParts, row);
  }
  for (; n + 2 <= vectors; n += 2) {
    dots<M, 2>(a, b + n * kBlock, count, sums + n * kParts, row);
  }
  for (; n < vectors; ++n) dots<M, 1>(a, b + n * kBlock, count, sums + n * kParts, row);
}

PYDETOX_HD double sum_of_parts(const double* part) {
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// Calls visit(tensor, first element, elements) for the chunks begin..end.
template <class Visit>
void for_each_chunk(const int64_t* first_chunk, const WeightTable& table, int64_t elements,
                    int64_t begin, int64_t end, const Visit& visit) {
  int64_t tensor = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (first_chunk[tensor + 1] <= chunk) ++tensor;
    const int64_t first = (chunk - first_chunk[tensor]) * elements;
    const int64_t left = table.counts[tensor] - first;
    visit(chunk, tensor, first, left < elements ? left : elements);
  }
}

template <class Visit>
void for_each_block(int64_t first, int64_t count, int64_t block, const Visit& visit) {
  for (int64_t i = 0; i < count; i += block) {
    visit(first + i, count - i < block ? count - i : block);
  }
}

void gram(const WeightTable& table, double* partials, int64_t begin, int64_t end) {
  const int64_t models = table.lists - 1, pairs = models * (models + 1) / 2;
  Buffer<double> base(kBlock), differences(models * kBlock), sums(models * models * kParts);
  const auto add_block = [&](int64_t tensor, int64_t at, int64_t n) {
    widen(table.source(tensor, 0), at, n, base.get());
    for (int64_t i = 0; i < models; ++i) {
      difference_to(table.source(tensor, i + 1), at, n, base.get(), differences.get() + i * kBlock);
    }
    // Two rows of the matrix at a time, from their first diagonal entry on.
    for (int64_t i = 0; i < models; i += 2) {
      const double* a = differences.get() + i * kBlock;
      double* row = sums.get() + (i * models + i) * kParts;
      if (i + 1 < models) {
        dots_with_all<2>(a, a, models - i, n, row, models * kParts);
      } else {
        dots_with_all<1>(a, a, 1, n, row, 0);
      }
    }
  };
  for_each_chunk(table.first_chunk, table, kChunk, begin, end,
                 [&](int64_t chunk, int64_t tensor, int64_t first, int64_t count) {
                   memset(sums.get(), 0, models * models * kParts * sizeof(double));
                   for_each_block(first, count, kBlock,
                                  [&](int64_t at, int64_t n) { add_block(tensor, at, n); });
                   double* pair = partials + chunk * pairs;
                   for (int64_t i = 0; i < models; ++i) {
                     for (int64_t j = i; j < models; ++j) {
                       *pair++ = sum_of_parts(sums.get() + (i * models + j) * kParts);
                     }
                   }
                 });
}

void project(const WeightTable& table, double* partials, int64_t begin, int64_t end) {
  constexpr int64_t kAtOnce = 4;
  const int64_t directions = table.lists - 2;
  Buffer<double> base(kBlock), difference(kBlock), vectors(kAtOnce * kBlock),
      sums(directions * kParts);
  const auto add_block = [&](int64_t tensor, int64_t at, int64_t n) {
    widen(table.source(tensor, 0), at, n, base.get());
    difference_to(table.source(tensor, 1), at, n, base.get(), difference.get());
    for (int64_t r = 0; r < directions; r += kAtOnce) {
      const int64_t some = directions - r < kAtOnce ? directions - r : kAtOnce;
      for (int64_t k = 0; k < some; ++k) {
        widen(table.source(tensor, 2 + r + k), at, n, vectors.get() + k * kBlock);
      }
      dots_with_all<1>(difference.get(), vectors.get(), some, n, sums.get() + r * kParts, 0);
    }
  };
  for_each_chunk(table.first_chunk, table, kChunk, begin, end,
                 [&](int64_t chunk, int64_t tensor, int64_t first, int64_t count) {
                   memset(sums.get(), 0, directions * kParts * sizeof(double));
                   for_each_block(first, count, kBlock,
                                  [&](int64_t at, int64_t n) { add_block(tensor, at, n); });
                   for (int64_t r = 0; r < directions; ++r) {
                     partials[chunk * directions + r] = sum_of_parts(sums.get() + r * kParts);
                   }
                 });
}

// values[j] = -values[j] where bit (first + j) of the signs is set; first: a multiple of 64.
PYDETOX_HD void flip_signs(double* values, const uint64_t* signs, int64_t first, int64_t count) {
  int64_t j = 0;
#if PYDETOX_VEC_BYTES > 0
  using Bits = Vec<uint64_t, kLane>;
  Bits shift{};
  for (int lane = 0; lane < kLane; ++lane) shift[lane] = 63 - static_cast<uint64_t>(lane);
  for (; j + kLane <= count; j += kLane) {
    const uint64_t word = signs[(first + j) / 64] >> ((first + j) % 64);
    const Bits flip = ((Bits{} + word) << shift) & (uint64_t{1} << 63);
    store(values + j, load<Bits>(values + j) ^ flip);
  }
#endif
  for (; j < count; ++j) {
    const uint64_t bit = signs[(first + j) / 64] >> ((first + j) % 64) & 1;
    values[j] = bit_cast<double>(bit_cast<uint64_t>(values[j]) ^ (bit << 63));
  }
}

PYDETOX_HD void add(double* __restrict to, const double* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

void sketch(const SketchParams& params, double* partials, int64_t begin, int64_t end) {
  const WeightTable& table = params.table;
  const int64_t size = params.size;
  Buffer<double> base(kBlock), difference(kBlock);
  Buffer<uint64_t> signs(size / 64 + 2);
  for_each_chunk(
      params.first_chunk, table, params.blocks_per_chunk * size, begin, end,
      [&](int64_t chunk, int64_t tensor, int64_t first, int64_t count) {
        double* place = partials + chunk * size;
        memset(place, 0, size * sizeof(double));
        const uint64_t key = params.keys[tensor];
        for (int64_t done = 0; done < count; done += size) {
          const int64_t in_block = count - done < size ? count - done : size;
          const auto block =
              static_cast<uint64_t>(params.first_block[tensor] + (first + done) / size);
          const auto rotation =
              static_cast<int64_t>(sketch_rotation(key, block, static_cast<uint64_t>(size)));
          for (int64_t group = 0; group * 128 < in_block; ++group) {
            const Random128 random = sketch_signs(key, block, static_cast<uint64_t>(group));
            memcpy(signs.get() + group * 2, random.word, sizeof(random.word));
          }
          for (int64_t j = 0; j < in_block; j += kBlock) {
            const int64_t n = in_block - j < kBlock ? in_block - j : kBlock;
            widen(table.source(tensor, 0), first + done + j, n, base.get());
            difference_to(table.source(tensor, 1), first + done + j, n, base.get(),
                          difference.get());
            flip_signs(difference.get(), signs.get(), j, n);
            const int64_t at = (j + rotation) & (size - 1);
            const int64_t straight = n < size - at ? n : size - at;
            add(place + at, difference.get(), straight);
            add(place, difference.get() + straight, n - straight);
          }
        }
      });
}

template <class T>
PYDETOX_HD void narrow_as(const double* __restrict from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    T value;
    if constexpr (sizeof(T) == 8) {
      value = from[i];
    } else if constexpr (sizeof(T) == 4) {
      value = static_cast<float>(from[i]);
    } else {
      value = store_as<T>(from[i]);
    }
    memcpy(to + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
}

PYDETOX_HD void narrow_to(const Source& target, int64_t begin, int64_t count, const double* from) {
  char* to = static_cast<char*>(const_cast<void*>(target.data)) + begin * size_of(target.dtype);
  switch (target.dtype) {
    case DType::kFloat64:
      return narrow_as<double>(from, count, to);
    case DType::kFloat32:
      return narrow_as<float>(from, count, to);
    case DType::kBFloat16:
      return narrow_as<BFloat16>(from, count, to);
    default:
      return narrow_as<Float16>(from, count, to);
  }
}

PYDETOX_HD void add_scaled(double* __restrict to, double factor, const double* __restrict from,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

void apply(const ApplyParams& params, int64_t begin, int64_t end) {
  const WeightTable& table = params.table;
  const int64_t vectors = params.vectors;
  Buffer<double> base(kApplyBlock), changes(vectors * kApplyBlock), result(kApplyBlock);
  for_each_chunk(
      table.first_chunk, table, kChunk, begin, end,
      [&](int64_t, int64_t tensor, int64_t first, int64_t count) {
        for_each_block(first, count, kApplyBlock, [&](int64_t at, int64_t n) {
          widen(table.source(tensor, 0), at, n, base.get());
          for (int64_t r = 0; r < vectors; ++r) {
            widen(table.source(tensor, 1 + r), at, n, changes.get() + r * kApplyBlock);
          }
          for (int64_t m = 0; m < params.results; ++m) {
            memcpy(result.get(), base.get(), static_cast<size_t>(n) * sizeof(double));
            for (int64_t r = 0; r < vectors; ++r) {
              const int64_t row = m * vectors + r;
              const double factor =
                  params.coefficients[params.per_tensor ? row * table.tensors + tensor : row];
              add_scaled(result.get(), factor, changes.get() + r * kApplyBlock, n);
            }
            narrow_to(table.source(tensor, 1 + vectors + m), at, n, result.get());
          }
        });
      });
}

}  // namespace

extern const WeightKernels kWeightKernels;
const WeightKernels kWeightKernels{gram, project, sketch, apply};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

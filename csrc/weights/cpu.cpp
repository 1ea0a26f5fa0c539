// Gram matrices, projections, sketches and linear combinations of weight differences for one
// instruction set (see csrc/common/vec.h).
//
// Every kernel walks through a chunk in blocks that stay in the first-level cache: the weights are
// widened to double there once, and whatever the operation needs is computed from that.

#include "csrc/weights/cpu_blocks.h"

namespace pydetox::cpu {
inline namespace PYDETOX_ISA {
namespace {

constexpr int64_t kBlock = 128;       // for sums: differences of many models fit beside each other
constexpr int64_t kApplyBlock = 512;  // for results: fewer, longer stretches
// How far ahead memory is asked for, in elements.
constexpr int64_t kAhead = 1024;
// Sums run in this many interleaved parts on every instruction set: element i goes to part i % 8.
constexpr int kParts = 8;
// Sums of blocks are added up in stretches of this many elements, and those over the chunk: an
// error grows with the longest row of additions, not with the number of elements.
constexpr int64_t kStretch = 4096;
// Rows of a tile of a Gram matrix: with four columns, as many sums as the registers hold.
constexpr int kGramRows = PYDETOX_VEC_BYTES == 64 ? 4 : 2;

// sums[m, n][i % kParts] += the sum of a_m[i] * b_n[i] over a block, for M vectors a_m and N
// vectors b_n at once: what is loaded once serves several products, and the additions of one sum
// wait for each other, those of several do not. Vectors lie kBlock doubles apart, sums of one a_m
// kParts, of the next a_m `row`. kTriangle: b is a, and only n >= m is wanted.
template <int M, int N, bool kTriangle>
PYDETOX_HD void dots(const double* a, const double* b, int64_t count, double* sums, int64_t row) {
  constexpr int kVectors = kParts / kLane;
  constexpr int kTogether = M * N * kVectors <= 16 ? kVectors : 1;
  const auto wanted = [](int m, int n) { return !kTriangle || n >= m; };
  for (int first = 0; first < kVectors; first += kTogether) {
    Doubles total[M][N][kTogether];
    PYDETOX_UNROLL
    for (int m = 0; m < M; ++m) {
      PYDETOX_UNROLL
      for (int n = 0; n < N; ++n) {
        PYDETOX_UNROLL
        for (int v = 0; v < kTogether; ++v) total[m][n][v] = Doubles{};
      }
    }
    for (int64_t i = 0; i + kParts <= count; i += kParts) {
      PYDETOX_UNROLL
      for (int v = 0; v < kTogether; ++v) {
        const int64_t at = i + (first + v) * kLane;
        Doubles left[M];
        PYDETOX_UNROLL
        for (int m = 0; m < M; ++m) left[m] = load<Doubles>(a + m * kBlock + at);
        PYDETOX_UNROLL
        for (int n = 0; n < N; ++n) {
          const Doubles right =
              kTriangle ? left[n < M ? n : 0] : load<Doubles>(b + n * kBlock + at);
          PYDETOX_UNROLL
          for (int m = 0; m < M; ++m) {
            if (wanted(m, n)) total[m][n][v] = fused(left[m], right, total[m][n][v]);
          }
        }
      }
    }
    PYDETOX_UNROLL
    for (int m = 0; m < M; ++m) {
      PYDETOX_UNROLL
      for (int n = 0; n < N; ++n) {
        PYDETOX_UNROLL
        for (int v = 0; v < kTogether; ++v) {
          double* sum = sums + m * row + n * kParts + (first + v) * kLane;
          if (wanted(m, n)) store(sum, load<Doubles>(sum) + total[m][n][v]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = kTriangle ? m : 0; n < N; ++n) {
      for (int64_t j = count / kParts * kParts; j < count; ++j) {
        double& part = sums[m * row + n * kParts + j % kParts];
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
  const auto some = [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    for (; n + N <= vectors; n += N) {
      dots<M, N, false>(a, b + n * kBlock, count, sums + n * kParts, row);
    }
  };
  some(Width<4>{});
  some(Width<2>{});
  some(Width<1>{});
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

PYDETOX_HD void add(double* __restrict to, const double* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// totals += the sums over a chunk, for functions add_block(first, elements) that add to `sums`.
template <class AddBlock>
void sum_chunk(int64_t first, int64_t count, int64_t size, double* sums, double* totals,
               const AddBlock& add_block) {
  const auto bytes = static_cast<size_t>(size) * sizeof(double);
  memset(totals, 0, bytes);
  for_each_block(first, count, kStretch, [&](int64_t at, int64_t n) {
    memset(sums, 0, bytes);
    for_each_block(at, n, kBlock, add_block);
    add(totals, sums, size);
  });
}

// Asks for the blocks to come of a table's lists, which take turns: in each block some of them ask
// for all that they need until their next turn. Beside the many products of a Gram matrix, memory
// is read faster in a few long stretches than in a short one of every list (160 instead of 205 ms
// for nine lists of 87.8M weights on two cores with AVX-512; projections lose by it).
PYDETOX_HD void prefetch_in_turns(const WeightTable& table, int64_t tensor, int64_t at) {
  constexpr int64_t kMostTurns = 16;  // what was asked for must stay in the second-level cache
  const int64_t turns = table.lists < kMostTurns ? table.lists : kMostTurns;
  for (int64_t list = at / kBlock % turns; list < table.lists; list += turns) {
    prefetch(table.source(tensor, list), at + kAhead, turns * kBlock);
  }
}

// The products of M differences with each other and with those after them, `left` in all: row by
// row, sums of the first one's row from its diagonal entry on.
template <int M>
PYDETOX_HD void gram_rows(const double* differences, int64_t left, int64_t count, double* sums,
                          int64_t row) {
  dots<M, M, true>(differences, differences, count, sums, row);
  dots_with_all<M>(differences, differences + M * kBlock, left - M, count, sums + M * kParts, row);
}

void gram(const WeightTable& table, double* partials, int64_t begin, int64_t end) {
  const int64_t models = table.lists - 1, pairs = models * (models + 1) / 2;
  const int64_t row = models * kParts;
  Buffer<double> base(kBlock), differences(models * kBlock), sums(models * row),
      totals(models * row);
  const auto add_block = [&](int64_t tensor, int64_t at, int64_t n) {
    const Source* sources = &table.source(tensor, 0);
    prefetch_in_turns(table, tensor, at);
    widen(sources[0], at, n, base.get());
    for (int64_t i = 0; i < models; ++i) {
      difference_to(sources[i + 1], at, n, base.get(), differences.get() + i * kBlock);
    }
    int64_t i = 0;
    const auto some = [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      for (; i + M <= models; i += M) {
        gram_rows<M>(differences.get() + i * kBlock, models - i, n, sums.get() + i * (row + kParts),
                     row);
      }
    };
    some(Width<kGramRows>{});
    if constexpr (kGramRows > 2) some(Width<2>{});
    some(Width<1>{});
  };
  for_each_chunk(table.first_chunk, table, kChunk, begin, end,
                 [&](int64_t chunk, int64_t tensor, int64_t first, int64_t count) {
                   sum_chunk(first, count, models * row, sums.get(), totals.get(),
                             [&](int64_t at, int64_t n) { add_block(tensor, at, n); });
                   double* pair = partials + chunk * pairs;
                   for (int64_t i = 0; i < models; ++i) {
                     for (int64_t j = i; j < models; ++j) {
                       *pair++ = sum_of_parts(totals.get() + (i * models + j) * kParts);
                     }
                   }
                 });
}

void project(const WeightTable& table, double* partials, int64_t begin, int64_t end) {
  constexpr int64_t kAtOnce = 4;
  const int64_t directions = table.lists - 2;
  Buffer<double> base(kBlock), difference(kBlock), vectors(kAtOnce * kBlock),
      sums(directions * kParts), totals(directions * kParts);
  const auto add_block = [&](int64_t tensor, int64_t at, int64_t n) {
    prefetch(table.source(tensor, 0), at + kAhead, n);
    prefetch(table.source(tensor, 1), at + kAhead, n);
    difference_of(table.source(tensor, 0), table.source(tensor, 1), at, n, base.get(),
                  difference.get());
    for (int64_t r = 0; r < directions; r += kAtOnce) {
      const int64_t some = directions - r < kAtOnce ? directions - r : kAtOnce;
      for (int64_t k = 0; k < some; ++k) {
        prefetch(table.source(tensor, 2 + r + k), at + kAhead, n);
        widen(table.source(tensor, 2 + r + k), at, n, vectors.get() + k * kBlock);
      }
      dots_with_all<1>(difference.get(), vectors.get(), some, n, sums.get() + r * kParts, 0);
    }
  };
  for_each_chunk(table.first_chunk, table, kChunk, begin, end,
                 [&](int64_t chunk, int64_t tensor, int64_t first, int64_t count) {
                   sum_chunk(first, count, directions * kParts, sums.get(), totals.get(),
                             [&](int64_t at, int64_t n) { add_block(tensor, at, n); });
                   for (int64_t r = 0; r < directions; ++r) {
                     partials[chunk * directions + r] = sum_of_parts(totals.get() + r * kParts);
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
            prefetch(table.source(tensor, 0), first + done + j + kAhead, n);
            prefetch(table.source(tensor, 1), first + done + j + kAhead, n);
            difference_of(table.source(tensor, 0), table.source(tensor, 1), first + done + j, n,
                          base.get(), difference.get());
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

#if PYDETOX_VEC_BYTES > 0
// The same for float32 throughout, which most weights are, in registers; returns how many elements
// of `count` it has done. sources: base, vectors, results. factors: [results, vectors].
int64_t apply_to_floats(const Source* sources, int64_t vectors, int64_t results,
                        const double* factors, int64_t begin, int64_t count) {
  constexpr int kUnroll = 4;
  constexpr int64_t kStep = kUnroll * kLane;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Doubles start[kUnroll];  // all of it is read before any of it may be overwritten
    const char* base = address_of(sources[0], begin + i);
    PYDETOX_UNROLL
    for (int k = 0; k < kUnroll; ++k) start[k] = doubles_of_floats(base + k * kLane * 4);
    for (int64_t m = 0; m < results; ++m) {
      Doubles value[kUnroll];
      PYDETOX_UNROLL
      for (int k = 0; k < kUnroll; ++k) value[k] = start[k];
      for (int64_t r = 0; r < vectors; ++r) {
        const Doubles factor = broadcast<Doubles>(factors[m * vectors + r]);
        const char* change = address_of(sources[1 + r], begin + i);
        PYDETOX_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
          value[k] += factor * doubles_of_floats(change + k * kLane * 4);
        }
      }
      char* to = const_cast<char*>(address_of(sources[1 + vectors + m], begin + i));
      PYDETOX_UNROLL
      for (int k = 0; k < kUnroll; ++k) store_floats(to + k * kLane * 4, value[k]);
    }
  }
  return i;
}
#endif

void apply(const ApplyParams& params, int64_t begin, int64_t end) {
  const WeightTable& table = params.table;
  const int64_t vectors = params.vectors, results = params.results;
  Buffer<double> base(kApplyBlock), changes(vectors * kApplyBlock), result(kApplyBlock),
      factors(results * vectors);
  const auto apply_to_block = [&](const Source* sources, int64_t at, int64_t n) {
    widen(sources[0], at, n, base.get());
    for (int64_t r = 0; r < vectors; ++r) {
      widen(sources[1 + r], at, n, changes.get() + r * kApplyBlock);
    }
    for (int64_t m = 0; m < results; ++m) {
      memcpy(result.get(), base.get(), static_cast<size_t>(n) * sizeof(double));
      for (int64_t r = 0; r < vectors; ++r) {
        add_scaled(result.get(), factors.get()[m * vectors + r], changes.get() + r * kApplyBlock,
                   n);
      }
      narrow_to(sources[1 + vectors + m], at, n, result.get());
    }
  };
  for_each_chunk(table.first_chunk, table, kChunk, begin, end,
                 [&](int64_t, int64_t tensor, int64_t first, int64_t count) {
                   for (int64_t i = 0; i < results * vectors; ++i) {
                     factors.get()[i] =
                         params.coefficients[params.per_tensor ? i * table.tensors + tensor : i];
                   }
                   const Source* sources = &table.source(tensor, 0);
                   [[maybe_unused]] bool floats = true;
                   for (int64_t list = 0; list < table.lists; ++list) {
                     floats = floats && sources[list].dtype == DType::kFloat32;
                   }
                   for_each_block(first, count, kApplyBlock, [&](int64_t at, int64_t n) {
                     for (int64_t list = 0; list < 1 + vectors; ++list) {
                       prefetch(sources[list], at + kAhead, n);
                     }
                     int64_t done = 0;
#if PYDETOX_VEC_BYTES > 0
                     if (floats) {
                       done = apply_to_floats(sources, vectors, results, factors.get(), at, n);
                     }
#endif
                     if (done < n) apply_to_block(sources, at + done, n - done);
                   });
                 });
}

}  // namespace

extern const WeightKernels kWeightKernels;
const WeightKernels kWeightKernels{gram, project, sketch, apply};

}  // namespace PYDETOX_ISA
}  // namespace pydetox::cpu

#pragma once

// Kernels over lists of weights; csrc/weights/core.h has what they compute and in which order.
// Compiled by nvcc, and by the host compiler for the emulator.
//
// The lists travel in the parameters of a launch, as many tensors as fit: nothing is copied to the
// device first. A block sums its chunk and writes its partial sums to a place of its own; a second
// kernel adds the chunks in order. Neither the grid nor the split into launches changes a bit.
//
// What limits these kernels is memory, and what a memory delivers is what is asked of it at a time.
// So every kernel exists once for each dtype (and once for lists of several), reads 16 bytes at a
// time where the lists lie alike, and asks for all lists before it waits for the first:
// benchmarks/cuda_report.py counts in the machine code that this is at least 64 bytes a thread.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/weights/core.h"

namespace pydetox::cuda {

constexpr int kWeightThreads = 256;
constexpr int kMaxTensors = 32;  // of one launch; with the pointers, within 4 KiB of parameters

// Tensors of one launch: those of one dtype, from anywhere in the table.
struct WeightBatch {
  int32_t tensors;
  int32_t lists;
  int32_t tensor[kMaxTensors];  // in the whole table
  int64_t counts[kMaxTensors];
  int64_t first_chunk[kMaxTensors + 1];  // of this launch
  int64_t table_chunk[kMaxTensors];      // a tensor's first chunk in the whole table
  const void* data[kMaxLists];           // [tensors, lists]
  uint8_t dtypes[kMaxLists];
};

// A chunk of one tensor.
struct Chunk {
  int tensor;          // of the launch
  int64_t begin, end;  // elements
  int64_t in_table;    // its number among all chunks
};
__device__ __forceinline__ Chunk chunk_of(const WeightBatch& batch, int64_t chunk,
                                          int64_t elements) {
  int tensor = 0;
  while (batch.first_chunk[tensor + 1] <= chunk) ++tensor;
  const int64_t of_tensor = chunk - batch.first_chunk[tensor];
  const int64_t begin = of_tensor * elements;
  const int64_t count = batch.counts[tensor];
  return {tensor, begin, begin + elements < count ? begin + elements : count,
          batch.table_chunk[tensor] + of_tensor};
}

// ---- reading lists ----

// Lists of several dtypes: elements are widened as they are read, by a switch for each list.
struct Mixed {};
template <class T>
constexpr bool kIsMixed = std::is_same<T, Mixed>::value;

// How elements wait in registers until all lists are read, and how many of them are 16 bytes.
template <class T>
struct Reading {
  using Raw = T;
  static constexpr int kCount = kMaxWordBytes / static_cast<int>(sizeof(T));
};
template <>
struct Reading<Mixed> {
  using Raw = double;
  static constexpr int kCount = 4;
};

// The lists of one tensor of a launch.
struct Lists {
  const WeightBatch& batch;
  int first;

  __device__ __forceinline__ Lists(const WeightBatch& b, int tensor)
      : batch(b), first(tensor * b.lists) {}
  __device__ __forceinline__ const void* data(int64_t list) const {
    return batch.data[first + list];
  }
  __device__ __forceinline__ DType dtype(int64_t list) const {
    return static_cast<DType>(batch.dtypes[first + list]);
  }
};

// raw[n] = element index(n) of a list where inside(n), else 0: single elements, all under way at
// once. kWritten: the kernel writes to the list, too.
template <class Stored, bool kWritten, class Raw, int N, class Index, class Inside>
__device__ __forceinline__ void load_stored(const void* data, const Index& index,
                                            const Inside& inside, Raw (&raw)[N]) {
  Stored stored[N] = {};
  PYDETOX_UNROLL
  for (int n = 0; n < N; ++n) {
    if (!inside(n)) continue;
    const Stored* from = static_cast<const Stored*>(data) + index(n);
    if constexpr (kWritten) {
      load_written<1>(from, &stored[n]);
    } else {
      load<1>(from, &stored[n]);
    }
  }
  PYDETOX_UNROLL
  for (int n = 0; n < N; ++n) {
    if constexpr (std::is_same<Raw, Stored>::value) {
      raw[n] = stored[n];
    } else {
      raw[n] = to_double(stored[n]);
    }
  }
}

template <class T, bool kWritten, int N, class Index, class Inside>
__device__ __forceinline__ void load_each(const Lists& lists, int64_t list, const Index& index,
                                          const Inside& inside,
                                          typename Reading<T>::Raw (&raw)[N]) {
  const void* data = lists.data(list);
  if constexpr (!kIsMixed<T>) {
    load_stored<T, kWritten>(data, index, inside, raw);
  } else {
    switch (lists.dtype(list)) {
      case DType::kFloat64:
        return load_stored<double, kWritten>(data, index, inside, raw);
      case DType::kFloat32:
        return load_stored<float, kWritten>(data, index, inside, raw);
      case DType::kBFloat16:
        return load_stored<BFloat16, kWritten>(data, index, inside, raw);
      default:
        return load_stored<Float16, kWritten>(data, index, inside, raw);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_one(void* data, int64_t index, double value) {
  const T narrow = store_as<T>(value);
  store<1>(static_cast<T*>(data) + index, &narrow);
}

// One element, as a result is stored in T (Mixed: as the list says).
template <class T>
__device__ __forceinline__ void store_weight(const Lists& lists, int64_t list, int64_t index,
                                             double value) {
  void* data = const_cast<void*>(lists.data(list));
  if constexpr (!kIsMixed<T>) {
    store_one<T>(data, index, value);
  } else {
    switch (lists.dtype(list)) {
      case DType::kFloat64:
        return store_one<double>(data, index, value);
      case DType::kFloat32:
        return store_one<float>(data, index, value);
      case DType::kBFloat16:
        return store_one<BFloat16>(data, index, value);
      default:
        return store_one<Float16>(data, index, value);
    }
  }
}

// A chunk's elements as 16-byte words and, one by one, what is before the first and after the last
// of them. Where the lists lie differently to 16 bytes there are no words.
template <class T>
struct Split {
  static constexpr int kCount = Reading<T>::kCount;
  int64_t begin, head, words, rest;

  __device__ __forceinline__ Split(const Lists& lists, const Chunk& chunk)
      : begin(chunk.begin), head(chunk.end - chunk.begin), words(0), rest(head) {
    if constexpr (!kIsMixed<T>) {
      const auto place = [&](int64_t list) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(lists.data(list)) % kMaxWordBytes);
      };
      const int offset = place(0);
      bool alike = true;
      for (int list = 1; list < lists.batch.lists; ++list) alike = alike && place(list) == offset;
      if (!alike) return;
      // A chunk begins at a multiple of 16 bytes from its tensor's beginning.
      const int64_t peeled = (kMaxWordBytes - offset) % kMaxWordBytes / static_cast<int>(sizeof(T));
      const int64_t count = head;
      if (peeled < count) head = peeled;
      words = (count - head) / kCount;
      rest = count - words * kCount;
    }
  }
  __device__ __forceinline__ int64_t word(int64_t w) const { return begin + head + w * kCount; }
  __device__ __forceinline__ int64_t single(int64_t r) const {
    return begin + r + (r < head ? 0 : words * kCount);
  }
};

// step(load, store) for all of a chunk that is this thread's, kWords times kCount elements at a
// time. load(list, raw [kWords][kCount]) reads a list; what is not there is 0. store(list, values)
// writes doubles to one, where there is an element.
template <class T, int kWords, class Step>
__device__ __forceinline__ void for_each_part(const Lists& lists, const Split<T>& split,
                                              const Step& step) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kCount = Reading<T>::kCount;
  const int64_t thread = threadIdx.x;
  if constexpr (!kIsMixed<T>) {
    for (int64_t w = thread; w < split.words; w += kWords * kWeightThreads) {
      const auto at = [&](int n) { return w + n * kWeightThreads; };
      step(
          [&](int64_t list, Raw(&raw)[kWords][kCount]) {
            const T* data = static_cast<const T*>(lists.data(list));
            PYDETOX_UNROLL
            for (int n = 0; n < kWords; ++n) {
              PYDETOX_UNROLL
              for (int e = 0; e < kCount; ++e) raw[n][e] = {};
              if (at(n) < split.words) load_written<kCount>(data + split.word(at(n)), raw[n]);
            }
          },
          [&](int64_t list, const double (&values)[kWords][kCount]) {
            T* data = static_cast<T*>(const_cast<void*>(lists.data(list)));
            PYDETOX_UNROLL
            for (int n = 0; n < kWords; ++n) {
              T narrow[kCount];
              PYDETOX_UNROLL
              for (int e = 0; e < kCount; ++e) narrow[e] = store_as<T>(values[n][e]);
              if (at(n) < split.words) store<kCount>(data + split.word(at(n)), narrow);
            }
          });
    }
  }
  for (int64_t r = thread; r < split.rest; r += kWords * kCount * kWeightThreads) {
    // Beside words there are fewer singles than threads: then a thread has no second one.
    const int64_t first = split.single(r);
    const auto at = [&](int n, int e) { return (n * kCount + e) * kWeightThreads; };
    step(
        [&](int64_t list, Raw(&raw)[kWords][kCount]) {
          PYDETOX_UNROLL
          for (int n = 0; n < kWords; ++n) {
            load_each<T, true>(
                lists, list, [&](int e) { return first + at(n, e); },
                [&](int e) { return r + at(n, e) < split.rest; }, raw[n]);
          }
        },
        [&](int64_t list, const double (&values)[kWords][kCount]) {
          PYDETOX_UNROLL
          for (int n = 0; n < kWords; ++n) {
            PYDETOX_UNROLL
            for (int e = 0; e < kCount; ++e) {
              if (r + at(n, e) < split.rest) {
                store_weight<T>(lists, list, first + at(n, e), values[n][e]);
              }
            }
          }
        });
  }
}

// ---- sums ----

// The sum over the block's threads, in a fixed order, for kValues values of each: the v-th is
// written to partials[place(v)].
template <int kValues, class Place>
__device__ __forceinline__ void sum_block(const double (&values)[kValues], double* partials,
                                          const Place& place) {
  constexpr int kWarps = kWeightThreads / kWarpSize;
  double* shared = shared_memory<double>();  // [kWarps, kValues]
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  PYDETOX_UNROLL
  for (int v = 0; v < kValues; ++v) {
    double sum = values[v];
    PYDETOX_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane == 0) shared[warp * kValues + v] = sum;
  }
  __syncthreads();
  if (thread < kValues) {
    double sum = shared[thread];
    for (int w = 1; w < kWarps; ++w) sum += shared[w * kValues + thread];
    store<1>(partials + place(thread), &sum);
  }
}

struct GramLaunch {
  WeightBatch batch;
  int64_t models;    // M
  double* partials;  // [chunks, tile pairs, tile * tile]
};

// Models of the second tile, where it is another, that a block takes: as many sums as fit into
// registers.
template <class T>
constexpr int kGramColumns = sizeof(T) == 2 ? 2 : 4;

// One block: a chunk, for the models of two tiles; pairs of tiles a <= b, row by row. kSame: a = b,
// where entries below the diagonal are left 0; else a part of the columns of b.
template <class T, int kRows, bool kSame>
__global__ void __launch_bounds__(kWeightThreads, 1) gram_chunks(const GramLaunch params) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kCount = Reading<T>::kCount, kWords = kRows == kFewModels ? 2 : 1;
  constexpr int kColumns = kSame ? kRows : kGramColumns<T>, kParts = kRows / kColumns;
  const int64_t tiles = ceil_div(params.models, kRows), pairs = tiles * (tiles + 1) / 2;
  // Launched for the pairs that are of one kind.
  const int64_t mine = kSame ? tiles : (pairs - tiles) * kParts;
  const int64_t chunk_index = blockIdx.x / mine;
  const int part = static_cast<int>(blockIdx.x % mine % kParts);
  int64_t column = blockIdx.x % mine / kParts, row = 0;
  if constexpr (kSame) {
    row = column;
  } else {
    for (; column >= tiles - 1 - row; ++row) column -= tiles - 1 - row;
    column += row + 1;
  }
  const int64_t pair = row * tiles - row * (row - 1) / 2 + (column - row);
  const Chunk chunk = chunk_of(params.batch, chunk_index, kChunk);
  const Lists lists(params.batch, chunk.tensor);
  const Split<T> split(lists, chunk);

  double sums[kRows * kColumns] = {};
  for_each_part<T, kWords>(lists, split, [&](const auto& load_list, const auto&) {
    Raw base[kWords][kCount], a[kRows][kWords][kCount];
    Raw b[kSame ? 1 : kColumns][kWords][kCount];
    load_list(0, base);
    PYDETOX_UNROLL
    for (int m = 0; m < kRows; ++m) {
      // A model that is not there is the base: a difference of 0.
      const int64_t model = row * kRows + m;
      load_list(model < params.models ? model + 1 : 0, a[m]);
    }
    if constexpr (!kSame) {
      PYDETOX_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int64_t model = column * kRows + part * kColumns + k;
        load_list(model < params.models ? model + 1 : 0, b[k]);
      }
    }
    PYDETOX_UNROLL
    for (int n = 0; n < kWords; ++n) {
      PYDETOX_UNROLL
      for (int e = 0; e < kCount; ++e) {
        const double start = to_double(base[n][e]);
        double left[kRows];
        PYDETOX_UNROLL
        for (int m = 0; m < kRows; ++m) left[m] = to_double(a[m][n][e]) - start;
        PYDETOX_UNROLL
        for (int k = 0; k < kColumns; ++k) {
          const double right = kSame ? left[k] : to_double(b[kSame ? 0 : k][n][e]) - start;
          PYDETOX_UNROLL
          for (int m = 0; m < kRows; ++m) {
            if (kSame && m > k) continue;
            double& sum = sums[m * kColumns + k];
            sum = fma(left[m], right, sum);
          }
        }
      }
    }
  });
  sum_block(sums, params.partials + (chunk.in_table * pairs + pair) * (kRows * kRows),
            [&](int v) { return v / kColumns * kRows + part * kColumns + v % kColumns; });
}

struct ProjectLaunch {
  WeightBatch batch;
  int64_t directions;  // R
  double* partials;    // [chunks, R rounded up to tiles]
};

// Blocks of a multiprocessor that registers must be enough for: elements of two bytes are eight to
// a word, and take more of them. (So do lists of several dtypes.)
template <class T>
constexpr int kBlocks = sizeof(T) <= 2 ? 1 : 2;

// One block: a chunk, for a tile of directions, which are read kGroup at a time.
template <class T, int kTile>
__global__ void __launch_bounds__(kWeightThreads, kBlocks<T>)
    project_chunks(const ProjectLaunch params) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kCount = Reading<T>::kCount, kWords = kTile == kFewDirections ? 2 : 1;
  constexpr int kGroup = kTile < 4 ? kTile : 4;
  const int64_t tiles = ceil_div(params.directions, kTile);
  const int64_t first = blockIdx.x % tiles * kTile;
  const Chunk chunk = chunk_of(params.batch, blockIdx.x / tiles, kChunk);
  const Lists lists(params.batch, chunk.tensor);
  const Split<T> split(lists, chunk);

  double sums[kTile] = {};
  for_each_part<T, kWords>(lists, split, [&](const auto& load_list, const auto&) {
    Raw base[kWords][kCount], model[kWords][kCount], direction[kGroup][kWords][kCount];
    load_list(0, base);
    load_list(1, model);
    double difference[kWords][kCount] = {};
    PYDETOX_UNROLL
    for (int group = 0; group < kTile; group += kGroup) {
      PYDETOX_UNROLL
      for (int r = 0; r < kGroup; ++r) {
        // One that is not there is read as the base; its sum is no part of the result.
        const int64_t which = first + group + r;
        load_list(which < params.directions ? which + 2 : 0, direction[r]);
      }
      stay_in_order();
      PYDETOX_UNROLL
      for (int n = 0; n < kWords; ++n) {
        PYDETOX_UNROLL
        for (int e = 0; e < kCount; ++e) {
          if (group == 0) difference[n][e] = to_double(model[n][e]) - to_double(base[n][e]);
          PYDETOX_UNROLL
          for (int r = 0; r < kGroup; ++r) {
            sums[group + r] = fma(difference[n][e], to_double(direction[r][n][e]), sums[group + r]);
          }
        }
      }
    }
  });
  sum_block(sums, params.partials + (chunk.in_table * tiles + blockIdx.x % tiles) * kTile,
            [](int v) { return v; });
}

// ---- sketch ----

struct SketchLaunch {
  WeightBatch batch;  // first_chunk, table_chunk: of chunks of blocks_per_chunk * size elements
  int64_t size;
  int64_t blocks_per_chunk;
  uint64_t keys[kMaxTensors];
  double* partials;  // [chunks, size]
};

constexpr int kPlacesPerThread = 4;
constexpr int kSketchPlaces = kPlacesPerThread * kWeightThreads;  // of a block
constexpr int kSignGroup = 128;                                   // elements of one random number
// Groups that kSketchPlaces neighbouring elements touch, wherever they begin.
constexpr int kSignGroups = kSketchPlaces / kSignGroup + 1;

PYDETOX_HD constexpr int64_t sketch_shared_bytes(int64_t blocks_per_chunk) {
  return blocks_per_chunk * static_cast<int64_t>(sizeof(int64_t) + kSignGroups * sizeof(Random128));
}

// One block: kSketchPlaces places of the sketch (fewer if it is smaller), for a chunk. A place adds
// up what the chunk's blocks put there, in order: the same sum as on the CPU, bit for bit. The
// rotations, and the signs of what the places get, are drawn once for the whole block.
template <class T>
__global__ void __launch_bounds__(kWeightThreads, 2) sketch_chunks(const SketchLaunch params) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kWords = kIsMixed<T> ? 2 : 4;  // blocks of the chunk that are read at once
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t blocks = params.blocks_per_chunk, size = params.size;
  auto* signs = shared_memory<Random128>();  // [blocks, kSignGroups]
  auto* rotations = reinterpret_cast<int64_t*>(signs + blocks * kSignGroups);  // [blocks]
  const int64_t groups = ceil_div(size, kSketchPlaces);
  const int64_t first_place = blockIdx.x % groups * kSketchPlaces;
  const Chunk chunk = chunk_of(params.batch, blockIdx.x / groups, blocks * size);
  const Lists lists(params.batch, chunk.tensor);
  const uint64_t key = params.keys[chunk.tensor];
  const int64_t first_block = chunk.begin / size;

  for (int64_t b = thread; b < blocks; b += kWeightThreads) {
    rotations[b] = static_cast<int64_t>(
        sketch_rotation(key, static_cast<uint64_t>(first_block + b), static_cast<uint64_t>(size)));
  }
  __syncthreads();  // the rotations are there
  // Element j of a block lies in group j / kSignGroup; a size below that is one group.
  const int64_t last_group = size > kSignGroup ? size / kSignGroup - 1 : 0;
  const auto first_group = [&](int64_t b) {
    return ((first_place - rotations[b]) & (size - 1)) / kSignGroup;
  };
  for (int64_t i = thread; i < blocks * kSignGroups; i += kWeightThreads) {
    const int64_t b = i / kSignGroups;
    const int64_t group = (first_group(b) + i % kSignGroups) & last_group;
    signs[i] =
        sketch_signs(key, static_cast<uint64_t>(first_block + b), static_cast<uint64_t>(group));
  }
  __syncthreads();  // the signs are there

  double sums[kPlacesPerThread] = {};
  // Blocks b to b + kWords; whole: all of their elements are there, and a place for every thread.
  const auto step = [&](int64_t b, auto whole) {
    Raw base[kPlacesPerThread * kWords], model[kPlacesPerThread * kWords];
    const auto place = [&](int n) {
      return first_place + n % kPlacesPerThread * kWeightThreads + thread;
    };
    const auto block = [&](int n) { return b + n / kPlacesPerThread; };
    const auto in_block = [&](int n) { return (place(n) - rotations[block(n)]) & (size - 1); };
    const auto index = [&](int n) { return chunk.begin + block(n) * size + in_block(n); };
    const auto inside = [&](int n) {
      return decltype(whole)::value ||
             (place(n) < size && block(n) < blocks && index(n) < chunk.end);
    };
    load_each<T, false>(lists, 1, index, inside, model);
    load_each<T, false>(lists, 0, index, inside, base);
    PYDETOX_UNROLL
    for (int n = 0; n < kPlacesPerThread * kWords; ++n) {
      if (!inside(n)) continue;
      const int64_t j = in_block(n);
      const int64_t group = (j / kSignGroup - first_group(block(n))) & last_group;
      const uint32_t word = signs[block(n) * kSignGroups + group].word[j % kSignGroup / 32];
      const double difference = to_double(model[n]) - to_double(base[n]);
      sums[n % kPlacesPerThread] += word >> (j % 32) & 1 ? -difference : difference;
    }
  };
  for (int64_t b = 0; b < blocks && chunk.begin + b * size < chunk.end; b += kWords) {
    const bool whole = size >= kSketchPlaces && b + kWords <= blocks &&
                       chunk.begin + (b + kWords) * size <= chunk.end;
    if (whole) {
      step(b, std::true_type{});
    } else {
      step(b, std::false_type{});
    }
  }
  PYDETOX_UNROLL
  for (int q = 0; q < kPlacesPerThread; ++q) {
    const int64_t place = first_place + q * kWeightThreads + thread;
    if (place < size) store<1>(params.partials + chunk.in_table * size + place, &sums[q]);
  }
}

// ---- over the chunks ----

struct SumParams {
  const double* partials;  // [chunks, values]
  int64_t chunks;
  int64_t values;
  double* sums;  // [values]
};

// One thread: one value, over the chunks in order, of which kAhead are read at once.
template <int kAhead>
__global__ void __launch_bounds__(kWeightThreads) sum_chunks(const SumParams params) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kWeightThreads + threadIdx.x;
  if (v >= params.values) return;
  double sum = 0;
  const double* part = params.partials + v;
  int64_t left = params.chunks;
  for (; left >= kAhead; left -= kAhead) {
    double parts[kAhead];
    PYDETOX_UNROLL
    for (int i = 0; i < kAhead; ++i) load<1>(part + i * params.values, &parts[i]);
    PYDETOX_UNROLL
    for (int i = 0; i < kAhead; ++i) sum += parts[i];
    part += kAhead * params.values;
  }
  for (; left > 0; --left) {
    double one;
    load<1>(part, &one);
    sum += one;
    part += params.values;
  }
  store<1>(params.sums + v, &sum);
}

struct UnpackParams {
  const double* sums;  // of whole tiles of pairs i <= j
  int64_t models;
  double* matrix;  // [models, models]
};

// One thread: one entry of the Gram matrix.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) unpack_gram(const UnpackParams params) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= params.models * params.models) return;
  const int64_t i = entry / params.models, j = entry % params.models;
  double value;
  load<1>(params.sums + gram_index(params.models, i < j ? i : j, i < j ? j : i), &value);
  store<1>(params.matrix + entry, &value);
}

// ---- combinations ----

struct ApplyLaunch {
  WeightBatch batch;
  int64_t vectors;  // R
  int64_t results;  // M
  int64_t tensors;  // of the whole table
  bool per_tensor;
  const double* coefficients;  // [M, R] or [M, R, tensors]
};

// Vectors of which a thread holds its part at once; with one it holds more of it.
constexpr int kFewVectors = 1, kManyVectors = 4;
constexpr int64_t kResultTile = 4;  // results, where there are more vectors than it can hold

__device__ __forceinline__ double coefficient(const ApplyLaunch& params, int64_t result,
                                              int64_t vector, int64_t tensor) {
  const int64_t row = result * params.vectors + vector;
  double factor;
  load<1>(params.coefficients + (params.per_tensor ? row * params.tensors + tensor : row), &factor);
  return factor;
}

// One block: a chunk of every result, for up to kVectors vectors. A thread reads its part of the
// base and of all vectors before it writes the first result, which may be the base.
template <class T, int kVectors>
__global__ void __launch_bounds__(kWeightThreads, kBlocks<T>)
    apply_chunks(const ApplyLaunch params) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kCount = Reading<T>::kCount, kWords = kVectors == kFewVectors ? 2 : 1;
  const Chunk chunk = chunk_of(params.batch, blockIdx.x, kChunk);
  const Lists lists(params.batch, chunk.tensor);
  const Split<T> split(lists, chunk);
  const int64_t tensor = params.batch.tensor[chunk.tensor];

  for_each_part<T, kWords>(lists, split, [&](const auto& load_list, const auto& store_list) {
    Raw base[kWords][kCount], change[kVectors][kWords][kCount];
    load_list(0, base);
    PYDETOX_UNROLL
    for (int r = 0; r < kVectors; ++r) {
      if (r < params.vectors) load_list(1 + r, change[r]);
    }
    for (int64_t m = 0; m < params.results; ++m) {
      double values[kWords][kCount];
      PYDETOX_UNROLL
      for (int n = 0; n < kWords; ++n) {
        PYDETOX_UNROLL
        for (int e = 0; e < kCount; ++e) values[n][e] = to_double(base[n][e]);
      }
      PYDETOX_UNROLL
      for (int r = 0; r < kVectors; ++r) {
        if (r >= params.vectors) break;
        const double factor = coefficient(params, m, r, tensor);
        PYDETOX_UNROLL
        for (int n = 0; n < kWords; ++n) {
          PYDETOX_UNROLL
          for (int e = 0; e < kCount; ++e) values[n][e] += factor * to_double(change[r][n][e]);
        }
      }
      store_list(1 + params.vectors + m, values);
    }
  });
}

// The same for any number of vectors, which are read kManyVectors at a time, for every kResultTile
// results again.
template <class T>
__global__ void __launch_bounds__(kWeightThreads, 1) apply_many(const ApplyLaunch params) {
  using Raw = typename Reading<T>::Raw;
  constexpr int kCount = Reading<T>::kCount;
  const Chunk chunk = chunk_of(params.batch, blockIdx.x, kChunk);
  const Lists lists(params.batch, chunk.tensor);
  const Split<T> split(lists, chunk);
  const int64_t tensor = params.batch.tensor[chunk.tensor];

  for_each_part<T, 1>(lists, split, [&](const auto& load_list, const auto& store_list) {
    Raw base[1][kCount];
    load_list(0, base);
    for (int64_t first = 0; first < params.results; first += kResultTile) {
      double values[kResultTile][1][kCount];
      PYDETOX_UNROLL
      for (int m = 0; m < kResultTile; ++m) {
        PYDETOX_UNROLL
        for (int e = 0; e < kCount; ++e) values[m][0][e] = to_double(base[0][e]);
      }
      for (int64_t begin = 0; begin < params.vectors; begin += kManyVectors) {
        Raw change[kManyVectors][1][kCount];
        PYDETOX_UNROLL
        for (int r = 0; r < kManyVectors; ++r) {
          if (begin + r < params.vectors) load_list(1 + begin + r, change[r]);
        }
        PYDETOX_UNROLL
        for (int r = 0; r < kManyVectors; ++r) {
          if (begin + r >= params.vectors) break;
          PYDETOX_UNROLL
          for (int m = 0; m < kResultTile; ++m) {
            if (first + m >= params.results) break;
            const double factor = coefficient(params, first + m, begin + r, tensor);
            PYDETOX_UNROLL
            for (int e = 0; e < kCount; ++e) {
              values[m][0][e] += factor * to_double(change[r][0][e]);
            }
          }
        }
      }
      PYDETOX_UNROLL
      for (int m = 0; m < kResultTile; ++m) {
        if (first + m < params.results) store_list(1 + params.vectors + first + m, values[m]);
      }
    }
  });
}

}  // namespace pydetox::cuda

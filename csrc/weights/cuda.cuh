#pragma once

// Kernels over lists of weights; csrc/weights/core.h has what they compute and in which order.
// Compiled by nvcc, and by the host compiler for the emulator.
//
// The lists travel in the parameters of a launch, as many tensors as fit: nothing is copied to the
// device first. A block sums its chunk and writes its partial sums to a place of its own; a second
// kernel adds the chunks in order. Neither the grid nor the split into launches changes a bit.

#include <cmath>
#include <cstdint>

#include "csrc/common/grid.h"
#include "csrc/common/memory.cuh"
#include "csrc/weights/core.h"
#include "csrc/weights/layout.h"

namespace pydetox::cuda {

constexpr int kMaxSources = kMaxLists;  // tensors, over all lists, whose pointers one launch holds
constexpr int kWeightThreads = 256;
constexpr int kGramTile = kGramTileModels;  // models whose differences a thread holds at once
constexpr int kProjectTile = kProjectTileDirections;  // directions, likewise
constexpr int kApplyTile = 8;                         // results, likewise
constexpr int kMaxTensors = 32;  // of one launch; with the pointers, within 4 KiB of parameters

// Tensors of one launch.
struct WeightBatch {
  int32_t tensors;
  int32_t lists;
  int64_t first_tensor;  // in the whole table
  int64_t chunk_offset;  // chunks of the launches before
  int64_t counts[kMaxTensors];
  int64_t first_chunk[kMaxTensors + 1];  // of this launch
  const void* data[kMaxSources];         // [tensors, lists]
  uint8_t dtypes[kMaxSources];
};

// A chunk of one tensor.
struct Chunk {
  int tensor;
  int64_t begin, end;  // elements
};
__device__ __forceinline__ Chunk chunk_of(const WeightBatch& batch, int64_t chunk,
                                          int64_t elements) {
  int tensor = 0;
  while (batch.first_chunk[tensor + 1] <= chunk) ++tensor;
  const int64_t begin = (chunk - batch.first_chunk[tensor]) * elements;
  const int64_t count = batch.counts[tensor];
  return {tensor, begin, begin + elements < count ? begin + elements : count};
}

__device__ __forceinline__ double load_double(const WeightBatch& batch, int tensor, int list,
                                              int64_t index) {
  const int source = tensor * batch.lists + list;
  const void* data = batch.data[source];
  switch (static_cast<DType>(batch.dtypes[source])) {
    case DType::kFloat64: {
      double value;
      load<1>(static_cast<const double*>(data) + index, &value);
      return value;
    }
    case DType::kFloat32: {
      float value;
      load<1>(static_cast<const float*>(data) + index, &value);
      return static_cast<double>(value);
    }
    case DType::kBFloat16: {
      BFloat16 value;
      load<1>(static_cast<const BFloat16*>(data) + index, &value);
      return static_cast<double>(to_float(value));
    }
    default: {
      Float16 value;
      load<1>(static_cast<const Float16*>(data) + index, &value);
      return static_cast<double>(to_float(value));
    }
  }
}

// The sum over the block's threads, in a fixed order, for `count` values of each: written to
// partials by the threads 0..count-1. `values` is a function of the index, known at compile time.
template <int kValues>
__device__ __forceinline__ void sum_block(const double (&values)[kValues], int count,
                                          double* partials) {
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
  if (thread < count) {
    double sum = shared[thread];
    for (int w = 1; w < kWarps; ++w) sum += shared[w * kValues + thread];
    store<1>(partials + thread, &sum);
  }
}

struct GramLaunch {
  WeightBatch batch;
  int64_t models;    // M
  double* partials;  // [chunks, tile pairs, kGramTile * kGramTile]
};

// One block: a chunk, for the models of two tiles; pairs of tiles a <= b, row by row.
__global__ void __launch_bounds__(kWeightThreads, 1) gram_chunks(const GramLaunch params) {
  const WeightBatch& batch = params.batch;
  const int64_t tiles = ceil_div(params.models, kGramTile), pairs = tiles * (tiles + 1) / 2;
  const int64_t chunk_index = blockIdx.x / pairs;
  int64_t pair = blockIdx.x % pairs, row = 0;
  for (; pair >= tiles - row; ++row) pair -= tiles - row;
  const int64_t left = row * kGramTile, right = (row + pair) * kGramTile;
  const bool same = left == right;
  const Chunk chunk = chunk_of(batch, chunk_index, kChunk);
  double sums[kGramTile * kGramTile] = {};
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kWeightThreads) {
    const double base = load_double(batch, chunk.tensor, 0, i);
    double a[kGramTile], b[kGramTile];
    PYDETOX_UNROLL
    for (int m = 0; m < kGramTile; ++m) {
      a[m] = left + m < params.models
                 ? load_double(batch, chunk.tensor, static_cast<int>(left) + m + 1, i) - base
                 : 0;
      b[m] = a[m];
    }
    if (!same) {
      PYDETOX_UNROLL
      for (int m = 0; m < kGramTile; ++m) {
        b[m] = right + m < params.models
                   ? load_double(batch, chunk.tensor, static_cast<int>(right) + m + 1, i) - base
                   : 0;
      }
    }
    PYDETOX_UNROLL
    for (int m = 0; m < kGramTile; ++m) {
      PYDETOX_UNROLL
      for (int n = 0; n < kGramTile; ++n) {
        sums[m * kGramTile + n] = fma(a[m], b[n], sums[m * kGramTile + n]);
      }
    }
  }
  sum_block(sums, kGramTile * kGramTile,
            params.partials + ((batch.chunk_offset + chunk_index) * pairs + blockIdx.x % pairs) *
                                  (kGramTile * kGramTile));
}

struct ProjectLaunch {
  WeightBatch batch;
  int64_t directions;  // R
  double* partials;    // [chunks, R rounded up to tiles]
};

// One block: a chunk, for a tile of directions.
__global__ void __launch_bounds__(kWeightThreads, 2) project_chunks(const ProjectLaunch params) {
  const WeightBatch& batch = params.batch;
  const int64_t tiles = ceil_div(params.directions, kProjectTile);
  const int64_t chunk_index = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kProjectTile;
  const Chunk chunk = chunk_of(batch, chunk_index, kChunk);
  double sums[kProjectTile] = {};
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kWeightThreads) {
    const double difference =
        load_double(batch, chunk.tensor, 1, i) - load_double(batch, chunk.tensor, 0, i);
    PYDETOX_UNROLL
    for (int r = 0; r < kProjectTile; ++r) {
      if (first + r < params.directions) {
        sums[r] =
            fma(difference, load_double(batch, chunk.tensor, static_cast<int>(first) + r + 2, i),
                sums[r]);
      }
    }
  }
  sum_block(sums, kProjectTile,
            params.partials +
                ((batch.chunk_offset + chunk_index) * tiles + blockIdx.x % tiles) * kProjectTile);
}

struct SketchLaunch {
  WeightBatch batch;  // first_chunk: of chunks of blocks_per_chunk * size elements
  int64_t size;
  int64_t blocks_per_chunk;
  uint64_t keys[kMaxTensors];
  double* partials;  // [chunks, size]
};

// One block: kWeightThreads places of the sketch (fewer if it is smaller), for a chunk. A place
// adds up what the chunk's blocks put there, in order: the same sum as on the CPU, bit for bit.
__global__ void __launch_bounds__(kWeightThreads, 4) sketch_chunks(const SketchLaunch params) {
  const WeightBatch& batch = params.batch;
  int64_t* rotations = shared_memory<int64_t>();  // [blocks_per_chunk]
  const int64_t groups = ceil_div(params.size, kWeightThreads);
  const int64_t chunk_index = blockIdx.x / groups;
  const int64_t place = blockIdx.x % groups * kWeightThreads + threadIdx.x;
  const int64_t elements = params.blocks_per_chunk * params.size;
  const Chunk chunk = chunk_of(batch, chunk_index, elements);
  const uint64_t key = params.keys[chunk.tensor];
  const int64_t first_block = chunk.begin / params.size;
  for (int64_t b = threadIdx.x; b < params.blocks_per_chunk; b += blockDim.x) {
    rotations[b] = static_cast<int64_t>(sketch_rotation(key, static_cast<uint64_t>(first_block + b),
                                                        static_cast<uint64_t>(params.size)));
  }
  __syncthreads();
  if (place >= params.size) return;
  double sum = 0;
  for (int64_t b = 0; b < params.blocks_per_chunk; ++b) {
    const int64_t j = (place - rotations[b]) & (params.size - 1);
    const int64_t i = chunk.begin + b * params.size + j;
    if (i >= chunk.end) continue;
    const Random128 random =
        sketch_signs(key, static_cast<uint64_t>(first_block + b), static_cast<uint64_t>(j / 128));
    const uint32_t half = j & 64 ? 2 : 0;
    const uint32_t word = j & 32 ? (half ? random.word[3] : random.word[1])
                                 : (half ? random.word[2] : random.word[0]);
    const double difference =
        load_double(batch, chunk.tensor, 1, i) - load_double(batch, chunk.tensor, 0, i);
    sum += word >> (j % 32) & 1 ? -difference : difference;
  }
  store<1>(params.partials + (batch.chunk_offset + chunk_index) * params.size + place, &sum);
}

struct SumParams {
  const double* partials;  // [chunks, values]
  int64_t chunks;
  int64_t values;
  double* sums;  // [values]
};

// One thread: one value, over the chunks in order.
__global__ void __launch_bounds__(kWeightThreads) sum_chunks(const SumParams params) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kWeightThreads + threadIdx.x;
  if (v >= params.values) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < params.chunks; ++chunk) {
    double part;
    load<1>(params.partials + chunk * params.values + v, &part);
    sum += part;
  }
  store<1>(params.sums + v, &sum);
}

struct UnpackParams {
  const double* sums;  // of whole tiles of pairs i <= j
  int64_t models;
  double* matrix;  // [models, models]
};

// One thread: one entry of the Gram matrix.
__global__ void __launch_bounds__(kWeightThreads) unpack_gram(const UnpackParams params) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kWeightThreads + threadIdx.x;
  if (entry >= params.models * params.models) return;
  const int64_t i = entry / params.models, j = entry % params.models;
  double value;
  load<1>(params.sums + gram_index(params.models, i < j ? i : j, i < j ? j : i), &value);
  store<1>(params.matrix + entry, &value);
}

struct ApplyLaunch {
  WeightBatch batch;
  int64_t vectors;  // R
  int64_t results;  // M
  int64_t tensors;  // of the whole table
  bool per_tensor;
  const double* coefficients;  // [M, R] or [M, R, tensors]
};

template <class T>
__device__ __forceinline__ void store_weight(void* data, int64_t index, double value) {
  const T narrow = store_as<T>(value);
  store<1>(static_cast<T*>(data) + index, &narrow);
}

// One block: a chunk of every result.
__global__ void __launch_bounds__(kWeightThreads) apply_chunks(const ApplyLaunch params) {
  const WeightBatch& batch = params.batch;
  const Chunk chunk = chunk_of(batch, blockIdx.x, kChunk);
  const int64_t column = batch.first_tensor + chunk.tensor;
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kWeightThreads) {
    const double base = load_double(batch, chunk.tensor, 0, i);
    for (int64_t first = 0; first < params.results; first += kApplyTile) {
      double values[kApplyTile];
      PYDETOX_UNROLL
      for (int m = 0; m < kApplyTile; ++m) values[m] = base;
      for (int64_t r = 0; r < params.vectors; ++r) {
        const double change = load_double(batch, chunk.tensor, static_cast<int>(1 + r), i);
        PYDETOX_UNROLL
        for (int m = 0; m < kApplyTile; ++m) {
          if (first + m >= params.results) break;
          const int64_t row = (first + m) * params.vectors + r;
          double factor;
          load<1>(params.coefficients + (params.per_tensor ? row * params.tensors + column : row),
                  &factor);
          values[m] += factor * change;
        }
      }
      PYDETOX_UNROLL
      for (int m = 0; m < kApplyTile; ++m) {
        if (first + m >= params.results) break;
        const int source =
            chunk.tensor * batch.lists + static_cast<int>(1 + params.vectors + first + m);
        void* data = const_cast<void*>(batch.data[source]);
        switch (static_cast<DType>(batch.dtypes[source])) {
          case DType::kFloat64:
            store_weight<double>(data, i, values[m]);
            break;
          case DType::kFloat32:
            store_weight<float>(data, i, values[m]);
            break;
          case DType::kBFloat16:
            store_weight<BFloat16>(data, i, values[m]);
            break;
          default:
            store_weight<Float16>(data, i, values[m]);
        }
      }
    }
  }
}

}  // namespace pydetox::cuda

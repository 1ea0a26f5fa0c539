#pragma once

// From a table of weights to launches: which tensors travel together, on what grid. One function
// for the GPU (weights.cu) and for the emulator, so that the tests cover it.

#include <cstdint>

#include "csrc/cuda/weights.cuh"
#include "csrc/cuda/weights_layout.h"

namespace pydetox::cuda {

// visit(WeightBatch, chunks of it); false where one tensor's lists do not fit into a launch.
template <class Visit>
bool for_each_batch(const WeightTable& table, const int64_t* first_chunk, const Visit& visit) {
  if (table.lists > kMaxSources) return false;
  const int64_t fitting = kMaxSources / table.lists;
  const int64_t most = fitting < kMaxTensors ? fitting : kMaxTensors;
  for (int64_t begin = 0; begin < table.tensors; begin += most) {
    const int64_t end = begin + most < table.tensors ? begin + most : table.tensors;
    WeightBatch batch{};
    batch.tensors = static_cast<int32_t>(end - begin);
    batch.lists = static_cast<int32_t>(table.lists);
    batch.first_tensor = begin;
    batch.chunk_offset = first_chunk[begin];
    for (int64_t t = begin; t < end; ++t) {
      batch.counts[t - begin] = table.counts[t];
      batch.first_chunk[t - begin] = first_chunk[t] - first_chunk[begin];
      for (int64_t list = 0; list < table.lists; ++list) {
        const int64_t at = (t - begin) * table.lists + list;
        batch.data[at] = table.source(t, list).data;
        batch.dtypes[at] = static_cast<uint8_t>(table.source(t, list).dtype);
      }
    }
    const int64_t chunks = first_chunk[end] - first_chunk[begin];
    batch.first_chunk[end - begin] = chunks;
    if (!visit(batch, chunks)) return false;
  }
  return true;
}

constexpr int64_t kWarps = kWeightThreads / kWarpSize;

// launch(kernel, parameters, LaunchShape) -> bool.
template <class Launch>
bool launch_sum(const double* partials, int64_t chunks, int64_t values, double* sums,
                const Launch& launch) {
  const SumParams params{partials, chunks, values, sums};
  return launch(&sum_chunks, params,
                LaunchShape{ceil_div(values, kWeightThreads), kWeightThreads, 0});
}

template <class Launch>
bool launch_gram(const WeightTable& table, double* partials, double* sums, double* matrix,
                 const Launch& launch) {
  const int64_t models = table.lists - 1, pairs = gram_tile_pairs(models);
  const bool done =
      for_each_batch(table, table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        const GramParams params{batch, models, partials};
        return launch(
            &gram_chunks, params,
            LaunchShape{chunks * pairs, kWeightThreads, kWarps * kGramTile * kGramTile * 8});
      });
  const UnpackParams unpack{sums, models, matrix};
  return done && launch_sum(partials, table.chunks(), gram_values(models), sums, launch) &&
         launch(&unpack_gram, unpack,
                LaunchShape{ceil_div(models * models, kWeightThreads), kWeightThreads, 0});
}

template <class Launch>
bool launch_project(const WeightTable& table, double* partials, double* sums,
                    const Launch& launch) {
  const int64_t directions = table.lists - 2, tiles = ceil_div(directions, kProjectTile);
  const bool done =
      for_each_batch(table, table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        const ProjectParams params{batch, directions, partials};
        return launch(&project_chunks, params,
                      LaunchShape{chunks * tiles, kWeightThreads, kWarps * kProjectTile * 8});
      });
  return done && launch_sum(partials, table.chunks(), project_values(directions), sums, launch);
}

template <class Launch>
bool launch_sketch(const WeightTable& table, const int64_t* first_chunk, int64_t blocks_per_chunk,
                   const uint64_t* keys, int64_t size, double* partials, double* sums,
                   const Launch& launch) {
  const bool done =
      for_each_batch(table, first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        SketchLaunch params{batch, size, blocks_per_chunk, {}, partials};
        for (int32_t t = 0; t < batch.tensors; ++t) params.keys[t] = keys[batch.first_tensor + t];
        return launch(&sketch_chunks, params,
                      LaunchShape{chunks * ceil_div(size, kWeightThreads), kWeightThreads,
                                  blocks_per_chunk * 8});
      });
  return done && launch_sum(partials, first_chunk[table.tensors], size, sums, launch);
}

template <class Launch>
bool launch_apply(const WeightTable& table, int64_t vectors, int64_t results,
                  const double* coefficients, bool per_tensor, const Launch& launch) {
  return for_each_batch(table, table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
    const ApplyLaunch params{batch, vectors, results, table.tensors, per_tensor, coefficients};
    return launch(&apply_chunks, params, LaunchShape{chunks, kWeightThreads, 0});
  });
}

}  // namespace pydetox::cuda

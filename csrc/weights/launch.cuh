#pragma once

// From a table of weights to launches: which tensors travel together, on what grid.

#include <cstdint>

#include "csrc/weights/cuda.cuh"
#include "csrc/weights/layout.h"

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
bool launch_gram(const GramParams& p, const Launch& launch) {
  const int64_t models = p.table.lists - 1, pairs = gram_tile_pairs(models);
  const bool done =
      for_each_batch(p.table, p.table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        return launch(
            &gram_chunks, GramLaunch{batch, models, p.partials},
            LaunchShape{chunks * pairs, kWeightThreads, kWarps * kGramTile * kGramTile * 8});
      });
  return done && launch_sum(p.partials, p.table.chunks(), gram_values(models), p.sums, launch) &&
         launch(&unpack_gram, UnpackParams{p.sums, models, p.result},
                LaunchShape{ceil_div(models * models, kWeightThreads), kWeightThreads, 0});
}

template <class Launch>
bool launch_project(const ProjectParams& p, const Launch& launch) {
  const int64_t directions = p.table.lists - 2, tiles = ceil_div(directions, kProjectTile);
  const bool done =
      for_each_batch(p.table, p.table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        return launch(&project_chunks, ProjectLaunch{batch, directions, p.partials},
                      LaunchShape{chunks * tiles, kWeightThreads, kWarps * kProjectTile * 8});
      });
  return done &&
         launch_sum(p.partials, p.table.chunks(), project_values(directions), p.sums, launch);
}

template <class Launch>
bool launch_sketch(const SketchParams& p, const Launch& launch) {
  const bool done =
      for_each_batch(p.table, p.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        SketchLaunch params{batch, p.size, p.blocks_per_chunk, {}, p.partials};
        for (int32_t t = 0; t < batch.tensors; ++t) params.keys[t] = p.keys[batch.first_tensor + t];
        return launch(&sketch_chunks, params,
                      LaunchShape{chunks * ceil_div(p.size, kWeightThreads), kWeightThreads,
                                  p.blocks_per_chunk * 8});
      });
  return done && launch_sum(p.partials, p.first_chunk[p.table.tensors], p.size, p.sums, launch);
}

template <class Launch>
bool launch_apply(const ApplyParams& p, const Launch& launch) {
  return for_each_batch(
      p.table, p.table.first_chunk, [&](const WeightBatch& batch, int64_t chunks) {
        const ApplyLaunch params{batch,           p.vectors,    p.results,
                                 p.table.tensors, p.per_tensor, p.coefficients};
        return launch(&apply_chunks, params, LaunchShape{chunks, kWeightThreads, 0});
      });
}

}  // namespace pydetox::cuda
